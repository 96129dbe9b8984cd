"""What kernels are given, grouped: the same for the plain Triton kernels and for those in Gluon. Imports no triton.

Forms, which kernels are compiled for, come out of caches, one object for equal ones: they compare by identity, since a
launch looks them up.
"""

from __future__ import annotations

import itertools
import math
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


class Axis(NamedTuple):
    """An axis of what programs sum up: a step along it is so many problems, and so many elements, away."""

    length: int
    problems: int
    elements: int


@dataclass(frozen=True, eq=False)
class Sum:
    """One array out of all programs' sums: row-major over ``axes``, summed over the axes ``over`` and over programs.

    Of a launch, number ``stage``, each program has ``size`` elements; this array begins at ``start`` there, and at
    ``at`` in the output.
    """

    stage: int
    size: int
    start: int
    at: int
    axes: tuple[Axis, ...]
    over: tuple[Axis, ...]

    @property
    def count(self) -> int:
        """Elements of the array."""
        return math.prod(axis.length for axis in self.axes)

    @property
    def terms(self) -> int:
        """What each of them is summed from, of one program of each problem."""
        return math.prod(axis.length for axis in self.over)


@dataclass(frozen=True, eq=False)
class FoldForm:
    """What the folding kernel is compiled for: where, among summed arrays, it finds products' gradients ``d_mix [L_y,
    H_y, L_x, H_x]`` (None: there are none) and losses ``[L_y]`` (None likewise), and where those of the weights go.
    ``elements``: H_y·D_y; ``own_heads``: each layer has head weights of its own."""

    layers_y: int
    heads_y: int
    layers_x: int
    heads_x: int
    elements: int
    own_heads: bool
    d_mix: int | None
    losses: int | None
    layer_mix: int
    head_mix: int


class _Rows:
    """Rows of a token: its layers' heads below each other."""

    layers_x: int
    heads_x: int
    layers_y: int
    heads_y: int

    @property
    def rows_x(self) -> int:
        """Of the source."""
        return self.layers_x * self.heads_x

    @property
    def rows_y(self) -> int:
        """Of the target."""
        return self.layers_y * self.heads_y


class _Form:
    """What a kernel is compiled for, and what each of its programs sums up: arrays one behind the other.

    Compares by identity, whatever else a form is: with the comparison of a Stage, two forms of one stage would be one
    to the cache of compiled kernels, and a launch would run what was compiled for another.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each array."""
        raise NotImplementedError

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each of them begins."""
        return (0, *itertools.accumulate(self.sizes))[:-1]

    @property
    def size(self) -> int:
        """All of them."""
        return sum(self.sizes)


@dataclass(frozen=True, eq=False)
class FusedForm(_Rows, _Form):
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
    def mix_first(self) -> bool:
        """Whether mixing comes before the projection."""
        return self.dim_x <= self.dim_y

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of d_mix, d_proj, d_bias, losses (of each chain)."""
        return 64 * 64, self.dim_x * self.dim_y, 64 * self.dim_y, 64 if self.mix_first else 128


@dataclass(frozen=True, eq=False)
class ProjectForm(_Form):
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
    def sizes(self) -> tuple[int, ...]:
        """Of d_proj, d_bias and losses, both of each chain."""
        return self.dim_x * self.dim_y, 128, 128


@dataclass(frozen=True)
class Stage(_Rows):
    """One launch: ``problems`` independent sets of source rows mixed (and projected) into sets of target rows.

    Attributes:
        kind: ``dense`` (one problem: all layers and heads), ``layers`` (a problem per target layer, all its heads),
            ``heads`` (a problem per source head, all layers) or ``rows`` (a problem per target layer and head, no
            mixing).
        problems: Their number.
        head_problems: How many of them lie side by side along the heads.
        layers_x, heads_x, layers_y, heads_y: Of one problem.
        projects: Whether ``dim_proj`` is applied.
        shared_proj: Whether all problems have the same one.
        dims_first: Whether the projection comes before the mixing.
    """

    kind: str
    problems: int
    head_problems: int
    layers_x: int
    heads_x: int
    layers_y: int
    heads_y: int
    projects: bool
    shared_proj: bool = True
    dims_first: bool = False

    @property
    def in_columns(self) -> bool:
        """Whether it only mixes, and so many rows that a tile's tokens had better stand side by side than below each
        other."""
        return not self.projects and (self.kind != "layers" or max(self.rows_x, self.rows_y) >= 16)

    @property
    def mixes(self) -> bool:
        """Whether rows are mixed at all."""
        return self.kind != "rows"

    def parts(self, bits: int) -> int:
        """How many numbers of so many bits a mixing weight is written as. Where states are mixed twice, layers before
        heads, there is a second one for what rounding took from the first: four roundings of 16 bits in a row would be
        too many."""
        return 2 if self.kind == "heads" and bits == 16 else int(self.mixes)


@dataclass(frozen=True)
class Tile:
    """Block sizes of a launch: ``tokens`` per tile, padded rows and dimensions, and how it is compiled.

    ``programs``: how many of them fit a multiprocessor's registers. ``delayed``: a tile's gradients are computed beside
    the next tile's residual.
    """

    tokens: int
    block_x: int
    block_y: int
    block_dx: int
    block_dy: int
    num_warps: int
    num_stages: int
    programs: int
    delayed: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class StageForm(_Form, Stage, Tile):
    """What a stage's kernel is compiled for: a problem's shape, its tile, and what is to be done.

    ``mode``: ``loss`` (read the target, compare), ``store`` (write the projection to it) or ``given`` (read the
    projection's gradient from it). ``flat``: a side is a workspace that holds only the tokens of this launch.
    """

    element: Any
    wide: Any
    dim_x: int
    dim_y: int
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

    @property
    def precision(self) -> str:
        """Of products."""
        return "ieee" if self.element.primitive_bitwidth == 32 else "tf32"

    @property
    def mix_parts(self) -> int:
        """How many numbers a mixing weight is written as."""
        return self.parts(self.element.primitive_bitwidth)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of d_mix, d_proj, d_bias, losses."""
        return (
            self.block_y * self.block_x * self.mix_grad,
            self.block_dx * self.block_dy * self.proj_grad,
            self.block_y * self.block_dy * self.bias_grad,
            self.block_y * (self.mode == "loss"),
        )
