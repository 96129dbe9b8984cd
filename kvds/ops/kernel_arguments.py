"""What kernels are given, grouped: the same for the plain Triton kernels and for those in Gluon. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Rows(NamedTuple):
    """One side's states or gradients: where its (layer, head) rows start, how far apart their tokens are.

    ``table``: int64 ``[layers · heads]``, addresses on the device; ``index``: ``[B, M]`` positions or None.
    """

    table: Any
    index: Any
    batch_stride: int
    token_stride: int


class Sides(NamedTuple):
    """Rows of the states and of their gradients (the states' own where no gradient is wanted)."""

    source: Rows
    target: Rows
    source_grad: Rows
    target_grad: Rows


class Maps(NamedTuple):
    """The operation's parameters. ``head_stride``: from a layer's head weights to the next one's, or 0."""

    layer_mix: Any
    head_mix: Any
    head_stride: int
    dim_proj: Any
    bias: Any
    scale: Any


class Weights(NamedTuple):
    """One stage's weights: ``mix [problems, parts, rows_y, rows_x]`` and ``dim_proj``, each with the stride from one
    problem's to the next one's, or 0; ``bias`` and ``scale`` of all layers. None where there is none."""

    mix: Any
    mix_stride: int
    dim_proj: Any
    proj_stride: int
    bias: Any
    scale: Any


class Tokens(NamedTuple):
    """Slots of all samples and of one, the ``mask`` of those that count, and how many are ``valid`` (None: all)."""

    slots: int
    positions: int
    mask: Any
    valid: Any


@dataclass(frozen=True)
class FusedForm:
    """What the fused kernel is compiled for."""

    element: Any
    layers_x: int
    heads_x: int
    layers_y: int
    heads_y: int
    dim_x: int
    dim_y: int
    loss: str
    normalize: bool
    source_grad: bool
    target_grad: bool

    @property
    def rows_x(self) -> int:
        """Source rows of a token."""
        return self.layers_x * self.heads_x

    @property
    def rows_y(self) -> int:
        """Target rows of a token."""
        return self.layers_y * self.heads_y

    @property
    def mix_first(self) -> bool:
        """Whether mixing comes before the projection."""
        return self.dim_x <= self.dim_y

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Of a program's sums: d_mix, d_proj, d_bias, losses (of each chain)."""
        return 64 * 64, self.dim_x * self.dim_y, 64 * self.dim_y, 64 if self.mix_first else 128

    @property
    def starts(self) -> tuple[int, int, int, int]:
        """Where each of them begins."""
        mix, proj, bias, _ = self.sizes
        return 0, mix, mix + proj, mix + proj + bias

    @property
    def size(self) -> int:
        """All of them."""
        return sum(self.sizes)


@dataclass(frozen=True)
class ProjectForm:
    """What the kernel for a ``dim_proj`` of each row is compiled for. ``layers_y``: all target layers."""

    element: Any
    layers_y: int
    heads_y: int
    dim_x: int
    dim_y: int
    loss: str
    normalize: bool
    target_grad: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of a program's sums: d_proj, d_bias and losses, both of each chain."""
        return self.dim_x * self.dim_y, 128, 128

    @property
    def starts(self) -> tuple[int, int, int]:
        """Where each of them begins."""
        return 0, self.sizes[0], self.sizes[0] + 128

    @property
    def size(self) -> int:
        """All of them."""
        return sum(self.sizes)


@dataclass(frozen=True)
class StageForm:
    """What a stage's kernel is compiled for: a problem's shape, its tile, and what is to be done.

    ``mode``: ``loss`` (read the target, compare), ``store`` (write the projection to it) or ``given`` (read the
    projection's gradient from it). ``in_columns``: a tile's tokens stand side by side, not below each other.
    ``flat``: a side is a workspace that holds only the tokens of this launch.
    """

    element: Any
    wide: Any
    precision: str
    head_problems: int
    layers_x: int
    heads_x: int
    layers_y: int
    heads_y: int
    dim_x: int
    dim_y: int
    tokens: int
    block_x: int
    block_y: int
    block_dx: int
    block_dy: int
    mix_parts: int
    projects: bool
    in_columns: bool
    dims_first: bool
    delayed: bool
    mode: str
    loss: str
    normalize: bool
    source_grad: bool
    target_grad: bool
    mix_grad: bool
    proj_grad: bool
    bias_grad: bool
    source_flat: bool
    target_flat: bool
    aligned: bool
    stages: int

    @property
    def rows_x(self) -> int:
        """Source rows of a token of one problem."""
        return self.layers_x * self.heads_x

    @property
    def rows_y(self) -> int:
        """Target rows of a token of one problem."""
        return self.layers_y * self.heads_y

    @property
    def mixes(self) -> bool:
        """Whether rows are mixed at all."""
        return self.mix_parts > 0

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Of a program's sums: d_mix, d_proj, d_bias, losses."""
        return (
            self.block_y * self.block_x * self.mix_grad,
            self.block_dx * self.block_dy * self.proj_grad,
            self.block_y * self.block_dy * self.bias_grad,
            self.block_y * (self.mode == "loss"),
        )

    @property
    def starts(self) -> tuple[int, int, int, int]:
        """Where each of them begins."""
        mix, proj, bias, _ = self.sizes
        return 0, mix, mix + proj, mix + proj + bias

    @property
    def size(self) -> int:
        """All of them."""
        return sum(self.sizes)
