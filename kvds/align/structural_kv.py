"""The structural KV loss: directions of keys and values, and the attention that the student's queries give."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kvds.align.aligner import aligner_settings
from kvds.align.aligner_part import compute_dtype
from kvds.align.flat import FlatAligner, FlatPart
from kvds.align.layer_map import LayerPlan
from kvds.align.loss import AlignmentLoss, average_parts
from kvds.config.settings import AlignmentSettings
from kvds.kv import AttentionStates, KVShape, LayerQueries, Selection, States, gather_positions

# Of the map's mean squared singular value: what keeps its inverse finite where it has lost a direction.
_RIDGE = 1e-3


def map_back(weight: Tensor, rows: Tensor) -> Tensor:
    """``argmin_x ‖x W − y‖² + λ‖x‖²`` for every row ``y``: the least-squares way back through a linear map.

    Args:
        weight: ``[D_x, D_y]``.
        rows: ``[…, D_y]``.

    Returns:
        ``[…, D_x]``.
    """
    gram = weight @ weight.T
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(1e-30)
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return rows @ torch.linalg.solve(gram + ridge * identity, weight).T


def in_the_manner_of(rows: Tensor, model: Tensor, mask: Tensor) -> Tensor:
    """``rows`` shifted and stretched to the mean per channel and the spread of ``model``, each sample and head alone.

    Args:
        rows: ``[B, H, M, D]``, finite.
        model: The same shape, finite.
        mask: ``[B, M]`` bool: the tokens that mean and spread are taken over.
    """
    kept = mask[:, None, :, None]
    count = mask.sum(1).clamp_min(1)[:, None, None, None]

    def centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = x.masked_fill(~kept, 0).sum(2, keepdim=True) / count
        x = (x - mean).masked_fill(~kept, 0)
        return x, mean, x.square().sum((2, 3), keepdim=True).sqrt()

    rows, _, spread = centred(rows)
    _, mean, wanted = centred(model)
    return rows * (wanted / spread.clamp_min(1e-12)) + mean


def log_attention(queries: Tensor, keys: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """``log softmax_u(scaling · q_t · k_u)`` over the selected tokens ``u`` up to ``t``.

    Args:
        queries: ``[B, H_q, M, D]``, finite; slots ascend in time.
        keys: ``[B, H, M, D]``, finite; ``H_q / H`` query heads in a row share a key head.
        mask: ``[B, M]`` bool.

    Returns:
        ``[B, H_q, M, M]``; a large negative number for tokens that a query does not see.
    """
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    scores = queries @ keys.mT * scaling
    seen = mask[:, None, None, :] & torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    # Not minus infinity: a row of padding may see no token at all.
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min / 2).log_softmax(-1)


def attention_distance(queries: Tensor, keys: Tensor, target_keys: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """``Σ_{b,h,t} KL(attention to target_keys ‖ attention to keys)``; the first of the two gets no gradient."""
    ours = log_attention(queries, keys, mask, scaling)
    with torch.no_grad():
        wanted = log_attention(queries, target_keys, mask, scaling)
    rows = (wanted.exp() * (wanted - ours)).sum(-1)
    return rows.masked_fill(~mask[:, None], 0).sum()


class StructuralKVPart(FlatPart):
    """``loss_i = mean over target heads and tokens of 1 − cos(projected_i, target_i)``, both around the target's mean.

    The map is that of :class:`FlatPart`. The unit of the loss plays no part in a cosine.
    """

    regresses = False

    def forward(  # type: ignore[override]
        self,
        student: tuple[Tensor, ...],
        teacher: tuple[Tensor, ...],
        index: Tensor | None,
        mask: Tensor,
        queries: tuple[LayerQueries, ...] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cosine loss, its layers ``[L_y]`` detached, and, with the student's queries, the attention loss."""
        source, target = self.sides(student, teacher)
        dtype = compute_dtype(source)
        heads, count = self.target_shape.num_key_value_heads, mask.sum().clamp_min(1)

        def selected(layer: Tensor) -> Tensor:  # [B, H, M, D]; what lies under the mask may be anything, also NaN
            rows = gather_positions(layer, index).to(dtype)
            return torch.where(mask[:, None, :, None], rows, rows.new_zeros(()))

        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        cosines, attention = [], []
        for i, layer in enumerate(target):
            keys = selected(source[i])
            rows = keys.transpose(1, 2).flatten(2) / self.source_scale[i].to(dtype)
            projected = (rows @ weight[i] + bias[i]).unflatten(2, (heads, -1)).transpose(1, 2)
            wanted = (selected(layer) - self.target_mean[i][:, None].to(dtype)) / self.target_scale[i].to(dtype)
            distance = 1 - F.cosine_similarity(projected, wanted, dim=-1)  # [B, H_y, M]
            cosines.append(distance.masked_fill(~mask[:, None], 0).sum() / (count * heads))
            if queries is not None:
                with torch.no_grad():
                    back = map_back(weight[i], wanted.transpose(1, 2).flatten(2))
                    back = back.unflatten(2, keys.shape[1::2]).transpose(1, 2)
                    back = in_the_manner_of(back, keys, mask)
                attention.append(self._attention(queries[i], keys, back, source[i], index, mask) / count)
        per_layer = torch.stack(cosines)
        return per_layer.mean(), per_layer.detach(), torch.stack(attention).mean() if attention else None

    @staticmethod
    def _attention(
        layer: LayerQueries, keys: Tensor, back: Tensor, states: Tensor, index: Tensor | None, mask: Tensor
    ) -> Tensor:
        rows = gather_positions(layer.queries, index).to(keys.dtype)
        rows = torch.where(mask[:, None, :, None], rows, rows.new_zeros(()))
        if layer.rotate is not None:  # it knows all positions: selected rows go back to their own for it
            places = None if index is None else index[:, None, :, None].expand_as(keys)

            def turned(x: Tensor) -> Tensor:
                if places is not None:
                    x = x.new_zeros(*states.shape).scatter(2, places, x)
                return gather_positions(layer.rotate(x), index).to(keys.dtype)  # type: ignore[misc]

            keys, back = turned(keys), turned(back)
        inputs = (rows, keys, back, mask, layer.scaling)
        if torch.is_grad_enabled():
            total = checkpoint(attention_distance, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            total = attention_distance(*inputs)
        return total / rows.shape[1]


class StructuralKVLoss(FlatAligner):
    """Cosine of keys and of values, plus the KL divergence between two attentions of the student's queries.

    ``loss = (cosine_K + cosine_V) / 2 + attention_loss_weight · attention``, each a mean over layers, heads and
    selected tokens. ``attention_i = KL(softmax(q · k̂ᵀ) ‖ softmax(q · kᵀ))`` over the selected tokens up to the query's
    own, with the student's keys ``k`` and, in their place, the teacher's keys brought into the student's space, ``k̂``:

    * ``k̂`` is the least-squares way back through the key map, which the cosine trains towards the teacher;
    * a cosine leaves size and offset of that map open, so ``k̂`` takes mean and spread of the student's own keys in the
      same sample and head: what is compared is which tokens stand out, at the sharpness that the student has;
    * the whole first attention (queries, map, ``k̂``, mean and spread) is a constant of the step.

    So every target is either the teacher's own or constant, no gradient leads to a map or a student that makes targets
    easier, and neither can collapse. Queries and keys are rotated as attention uses them; a sliding window is not
    applied.

    The arguments are those of :class:`KVAligner`.
    """

    part_class = StructuralKVPart

    @classmethod
    def flops_per_position(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings, slots: int) -> float:
        """The maps of both parts, the way back through the key map, and two attentions."""
        maps = super().flops_per_position(student, teacher, settings, slots)
        if not settings.attention_loss_weight:
            return maps
        width_x, width_y = cls.map_widths(student, teacher)
        # The student's: forward, again for the backward pass, and two products there; the constant one: twice.
        attention = slots * student.num_attention_heads * student.head_dim * (4 + 2)
        layers = LayerPlan.of(student, teacher, aligner_settings(settings))
        return maps + 2.0 * layers.targets * (width_x * width_y + attention)

    def forward(self, student: States, teacher: States, selection: Selection) -> AlignmentLoss:
        """As :meth:`KVAligner.forward`; ``student`` holds queries."""
        if not isinstance(student, AttentionStates):
            raise TypeError("alignment_mode structural_kv needs the student's queries: open_capture(…, 'attention')")
        self.check_states(student, teacher)
        teacher = teacher.detach()
        weight = self.settings.attention_loss_weight
        found = {}
        for name, part in self.parts.items():
            queries = student.queries if name == "key" and weight else None
            states = (getattr(side, f"{name}s") for side in (student, teacher))
            found[name] = part(*states, selection.index, selection.mask, queries)
        cosine = average_parts({name: result[:2] for name, result in found.items()})
        attention = found["key"][2]
        if attention is None:
            return cosine
        return cosine._replace(loss=cosine.loss + weight * attention, attention_loss=attention.detach())
