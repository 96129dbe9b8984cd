"""Layer and head mixing of a chunk of tokens, forward and backward, by matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from kvds.ops.gradients import LossProblem, Wanted

# Above this many head weights per pair of layers, layers and heads are mixed one after the other.
JOINT_HEAD_WEIGHTS = 4


class ChunkMixing:
    """``[L_x, H_x, n, D_x]`` to ``[L_y, H_y, n, D_x]``, and back.

    With few heads the two steps are one matrix ``[L_y·H_y, L_x·H_x]``: one product instead of two passes. With many
    heads that matrix would cost H times the FLOPs, so layers come first, then heads. A sparse map hands in the layers
    that each target layer reads (L_x = L_y), and only its heads are mixed.

    Attributes:
        heads: ``[L_y, H_y, H_x]``.
        staged: Whether ``forward`` wants room for the step between, ``[L_y, H_x, n, D_x]``.
    """

    def __init__(self, problem: LossProblem, dtype: torch.dtype, wanted: Wanted) -> None:
        self.wanted, self.sparse = wanted, problem.sparse
        self.heads = problem.layer_heads(dtype)
        layers_y, heads_y, heads_x = self.heads.shape
        layers_x = len(problem.source)
        joint = not self.sparse and heads_x * heads_y <= JOINT_HEAD_WEIGHTS
        self.staged = not self.sparse and not joint
        self.matrix: Tensor | None = None
        if not self.sparse:
            self.layers = problem.layer_mix.detach().to(dtype)
            self.d_layers = torch.zeros_like(self.layers)
        if joint:
            matrix = self.layers[:, None, :, None] * self.heads[:, :, None, :]
            self.matrix = matrix.reshape(layers_y * heads_y, layers_x * heads_x)
            self.d_matrix = torch.zeros_like(self.matrix)
        else:
            self.d_heads = torch.zeros_like(self.heads)

    def forward(self, x: Tensor, between: Tensor | None, out: Tensor) -> None:
        """``out[i,j] = Σ_l layers[i,l] Σ_h heads[i,j,h] x[l,h]``."""
        if self.matrix is not None:
            torch.mm(self.matrix, x.flatten(0, 1).flatten(1), out=out.flatten(0, 1).flatten(1))
            return
        if between is not None:
            torch.mm(self.layers, x.flatten(1), out=between.flatten(1))
        torch.bmm(self.heads, (x if between is None else between).flatten(2), out=out.flatten(2))

    def backward(self, x: Tensor, between: Tensor | None, d_out: Tensor) -> Tensor:
        """Adds to the gradients of the weights and returns that of ``x``, in its memory."""
        if self.matrix is not None:
            rows, flat = d_out.flatten(0, 1).flatten(1), x.flatten(0, 1).flatten(1)
            if self.wanted.mix:
                self.d_matrix.addmm_(rows, flat.T)
            if self.wanted.source:
                torch.mm(self.matrix.T, rows, out=flat)
            return x
        rows, mixed = d_out.flatten(2), (x if between is None else between).flatten(2)
        if self.wanted.mix:
            self.d_heads.baddbmm_(rows, mixed.mT)
        if self.wanted.source or (self.staged and self.wanted.layer_mix):
            torch.bmm(self.heads.mT, rows, out=mixed)
        if between is not None:
            if self.wanted.layer_mix:
                self.d_layers.addmm_(between.flatten(1), x.flatten(1).T)
            if self.wanted.source:
                torch.mm(self.layers.T, between.flatten(1), out=x.flatten(1))
        return x

    def gradients(self) -> dict[str, Tensor | None]:
        """Of ``layer_mix`` (dense maps) and of ``heads``."""
        if self.matrix is None:
            return {"layer_mix": None if self.sparse else self.d_layers, "head_mix": self.d_heads}
        layers_y, heads_y, heads_x = self.heads.shape
        per_pair = self.d_matrix.view(layers_y, heads_y, -1, heads_x)
        return {
            "layer_mix": torch.einsum("ijlh,ijh->il", per_pair, self.heads),
            "head_mix": torch.einsum("ijlh,il->ijh", per_pair, self.layers),
        }


def mixing_products(layers: tuple[int, int], heads: tuple[int, int], sparse: bool, learns: bool, moves: bool) -> int:
    """Multiply-adds per token and dimension of :class:`ChunkMixing`, forward and backward.

    Args:
        layers: ``L_x, L_y``.
        heads: ``H_x, H_y``.
        sparse: Whether each target layer has one source layer.
        learns: Whether the weights get a gradient.
        moves: Whether the source does.
    """
    (layers_x, layers_y), (heads_x, heads_y) = layers, heads
    of_heads, passes = layers_y * heads_x * heads_y, 1 + learns + moves
    if sparse:
        return of_heads * passes
    if heads_x * heads_y <= JOINT_HEAD_WEIGHTS:
        return layers_x * of_heads * passes
    return layers_x * layers_y * heads_x * passes + of_heads * (1 + learns + (moves or learns))
