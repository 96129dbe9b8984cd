"""The relation alignment: how tokens relate to each other in the keys, and in the values, of both models."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kvds.align.aligner import KVAligner
from kvds.align.aligner_part import AlignerPart, compute_dtype
from kvds.align.layer_map import LayerPlan
from kvds.config.settings import AlignmentSettings
from kvds.errors import InputError
from kvds.kv import KVShape, gather_positions
from kvds.ops.reference import penalty

# Relations of both models that are alive at a time, in numbers (256 MiB in fp32).
_CHUNK_ELEMENTS = 2**26


def token_relations(states: Tensor, mask: Tensor, kind: str) -> Tensor:
    """How each selected token relates to the selected tokens of its row.

    ``"softmax"``: ``log softmax_u(x_t · x_u / √d)``; ``"cosine"``: ``x_t · x_u / (‖x_t‖ ‖x_u‖)``. Both directions of
    time, as in the paper: a key is compared with later ones, too.

    Args:
        states: ``[B, A, M, d]``, finite; rows outside the mask are zero.
        mask: ``[B, M]`` bool.
        kind: ``"softmax"`` or ``"cosine"``.

    Returns:
        ``[B, A, M, M]``. Columns outside the mask hold a large negative number (softmax) or zero (cosine); rows outside
        it are finite and mean nothing.
    """
    if kind == "cosine":
        states = F.normalize(states, dim=-1)
        return states @ states.mT
    scores = states @ states.mT / math.sqrt(states.shape[-1])
    # Not minus infinity: a row of padding has no column at all.
    return scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min / 2).log_softmax(-1)


def relation_distance(source: Tensor, target: Tensor, mask: Tensor, kind: str, penalty_name: str) -> Tensor:
    """Distance of the relations of ``source`` from those of ``target``, summed over heads and selected tokens.

    ``"softmax"``: ``Σ_{b,a,t} KL(target_t ‖ source_t)``; ``"cosine"``: ``Σ_{b,a,t} mean_u ρ(source_tu − target_tu)``.

    Args:
        source: ``[B, A, M, d_x]``, zero outside the mask.
        target: ``[B, A, M, d_y]``, zero outside the mask.
        mask: ``[B, M]`` bool.
        kind: ``"softmax"`` or ``"cosine"``.
        penalty_name: ρ of the cosine kind.
    """
    ours, wanted = token_relations(source, mask, kind), token_relations(target, mask, kind)
    if kind == "softmax":
        rows = (wanted.exp() * (wanted - ours)).sum(-1)  # [B, A, M]
    else:
        pairs = penalty(ours - wanted, penalty_name).masked_fill(~mask[:, None, None, :], 0)
        rows = pairs.sum(-1) / mask.sum(1).clamp_min(1)[:, None, None]
    return rows.masked_fill(~mask[:, None], 0).sum()


class RelationPart(AlignerPart):
    """``loss_i = mean over relation heads a and tokens t of KL(R_i,a,t(target) ‖ R_i,a,t(source mix i))``.

    Heads of a layer are concatenated and cut anew into ``relation_heads`` pieces, as many on both sides, so that
    neither head counts nor dimensions need agree; ``R`` is :func:`token_relations`. Nothing is mapped: the layer mix
    (none with a hard layer map) is all that is learned. With ``relation_units=standard`` either side is first brought
    to mean zero and variance one by constants measured before step 1, the student's own at its start; ``raw`` takes
    states as they are, as the paper does, where a constant offset of the keys can leave every softmax with one token.

    Attributes:
        source_mean: ``[L_y, H_x, D_x]`` buffer, mean per channel at the start of what target layer i draws from.

    Source: Wang et al., MiniLMv2 (2020), section 3.1 (there for queries, too, and for one layer).
    """

    regresses = False

    source_mean: Tensor

    def __init__(self, student: KVShape, teacher: KVShape, settings: AlignmentSettings, seed: int) -> None:
        super().__init__(student, teacher, settings, seed)
        self.kind, self.standard = settings.relation_kind, settings.relation_units == "standard"
        self.heads = relation_heads(student, teacher, settings)
        source = self.source_shape
        self.register_buffer("source_mean", torch.zeros(self.num_targets, source.num_key_value_heads, source.head_dim))

    @classmethod
    def parameter_count(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> int:
        """The layer logits."""
        return math.prod(LayerPlan.of(student, teacher, settings).logits)

    @classmethod
    def flops_per_position(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings, slots: int) -> float:
        """Each token against every slot of its row, on both sides, and the mix of source layers."""
        layers = LayerPlan.of(student, teacher, settings)
        ours, theirs = (shape.num_key_value_heads * shape.head_dim for shape in (student, teacher))
        # The source's relations: forward, again for the backward pass, and two products there; the target's: twice.
        relate = layers.targets * slots * (4 * ours + 2 * theirs)
        return 2.0 * (relate + 3 * layers.mixed * ours)

    @property
    def projection(self) -> None:
        """None: relations need no map."""

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """One statistic for all channels of a layer, and the channels of source and target."""
        return 1, self.source_mean[0].numel(), self.target_mean[0].numel()

    def set_offset(self, mean_x: Tensor, mean_y: Tensor) -> None:
        """Remember the source's mean; that of the target is a buffer already."""
        self.source_mean.copy_(mean_x.reshape(self.source_mean.shape))

    def source_rows(self, rows: Tensor) -> Tensor:
        """``[layers, N, H_x, D_x]`` → ``[L_y, 1, N, H_x·D_x]``."""
        return self.mixed_layers(rows).flatten(2).unsqueeze(1)

    def target_rows(self, rows: Tensor) -> Tensor:
        """``[L_y, N, H_y, D_y]`` → ``[L_y, 1, N, H_y·D_y]``."""
        return rows.flatten(2).unsqueeze(1)

    def forward(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], index: Tensor | None, mask: Tensor,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One target layer after the other, a few heads and rows at a time, see :meth:`AlignerPart.forward`."""
        source, target = self.sides(student, teacher)
        dtype = compute_dtype(source)

        def selected(layer: Tensor) -> Tensor:  # [B, M, H·D]; what lies under the mask may be anything, also NaN
            rows = gather_positions(layer, index).transpose(1, 2).flatten(2)
            return torch.where(mask[..., None], rows.to(dtype), rows.new_zeros((), dtype=dtype))

        def pieces(rows: Tensor, mean: Tensor, scale: Tensor) -> Tensor:  # [B, M, W] → [B, A, M, W / A]
            if self.standard:
                rows = ((rows - mean.flatten().to(dtype)) / scale.to(dtype)).masked_fill(~mask[..., None], 0)
            return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)

        rows = [selected(layer) for layer in source]
        if self.layer_logits is not None:
            [(y, x)] = self.layer_blocks
            stacked = torch.stack(rows)
            mixed = (self.block_weights(y, x).to(dtype) @ stacked.flatten(1)).view(-1, *stacked.shape[1:])
            rows = list(mixed.unbind(0))
        count = (mask.sum() * self.heads).clamp_min(1)
        losses = []
        for i, layer in enumerate(target):
            ours = pieces(rows[i], self.source_mean[i], self.source_scale[i])
            wanted = pieces(selected(layer), self.target_mean[i], self.target_scale[i])
            losses.append(self._distance(ours, wanted, mask) / count)
        per_layer = torch.stack(losses)
        return per_layer.mean(), per_layer.detach()

    def _distance(self, ours: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
        """:func:`relation_distance` in chunks that the backward pass computes again instead of keeping them."""
        batch, heads, tokens, _ = ours.shape
        at_once = max(1, _CHUNK_ELEMENTS // (2 * tokens * tokens))  # pairs of a row and a head
        step_heads, step_rows = min(heads, at_once), max(1, at_once // heads)
        total = ours.new_zeros(())
        for b in range(0, batch, step_rows):
            for a in range(0, heads, step_heads):
                part = (slice(b, b + step_rows), slice(a, a + step_heads))
                inputs = (ours[part], wanted[part], mask[part[0]], self.kind, self.loss_name)
                if torch.is_grad_enabled():
                    total = total + checkpoint(
                        relation_distance, *inputs, use_reentrant=False, preserve_rng_state=False
                    )
                else:
                    total = total + relation_distance(*inputs)
        return total


def relation_heads(student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> int:
    """As many as asked for; unset: the greatest common divisor of the numbers of KV heads."""
    return settings.relation_heads or math.gcd(student.num_key_value_heads, teacher.num_key_value_heads)


class RelationAligner(KVAligner):
    """Relation alignment: the relations of :class:`RelationPart`, the arguments of :class:`KVAligner`."""

    part_class = RelationPart

    @classmethod
    def _check(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> None:
        widths = [shape.num_key_value_heads * shape.head_dim for shape in (student, teacher)]
        heads = relation_heads(student, teacher, settings)
        if any(width % heads for width in widths):
            raise InputError(
                f"relation_heads={heads}: expected a number that divides the KV width of the student ({widths[0]}) and "
                f"of the teacher ({widths[1]}), such as {math.gcd(*widths)}"
            )
        super()._check(student, teacher, settings)
