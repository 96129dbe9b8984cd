"""Attention-output error: what the maps change of what the target's attention hands on, beside how much they explain.

A residual of keys or values harms where attention looks, and in the directions that the output projection reads; R²
counts all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from kvds.align.aligner import KVAligner
from kvds.align.fitting import selected_rows
from kvds.kv import KVStates, Selection
from kvds.kv.attention_chunks import attention_chunks
from kvds.kv.attention_layout import output_projection
from kvds.kv.capture import KVCapture
from kvds.kv.families import attention_modules, backbone
from kvds.kv.observed import ObservedLayer

PARTS = {"key", "value"}


def _as_they_are(layer: int, rows: Tensor) -> Tensor:
    return rows


class AttentionOutputError:
    """Sums over batches for each target layer ``i``, with the target's own queries (the teacher's, where the map leads
    to the teacher; the student's, where it leads to the student), of every real token ``q``:

    * ``relative_error = Σ_q ‖o'_q − o_q‖² / Σ_q ‖o_q‖²``, 0 for a perfect map;
    * ``cosine = mean_q cos(o'_q, o_q)``, 1 for a perfect map.

    ``o`` is the output of the layer's attention, after its output projection and without its bias; ``o'`` is the same
    with projected keys and values, of the parts that are matched, at the positions that are selected. Where nothing is
    matched, and at all other positions (the first token), the target's own stay. Each layer is judged by itself: its
    queries are those of the undisturbed forward.

    Args:
        aligner: Whole, on the device of the states.
        target: The model that the map leads to, whole on this rank.
        rope: ``"pre"`` or ``"post"``, as the aligned keys were captured.
        plain_values: From a target layer's number and its values as they are aligned, ``[N, H, D]``, to those that
            attention mixes.

    Attributes:
        sums: ``[3, L_y]`` fp64 squares of the error, of the output, and cosines; and ``[1]`` tokens, to be added over
            ranks.
    """

    def __init__(
        self,
        aligner: KVAligner,
        target: nn.Module,
        *,
        rope: str = "pre",
        plain_values: Callable[[int, Tensor], Tensor] = _as_they_are,
    ) -> None:
        self._aligner, self._rope, self._plain_values = aligner, rope, plain_values
        self._body = backbone(target)
        self._projections = [output_projection(attention) for attention in attention_modules(target)]
        first = next(iter(aligner.named_parts().values()))
        side = 1 if first.to_teacher else 0
        self._layers = list(range(first.num_targets)) if first.pairs is None else [pair[side] for pair in first.pairs]
        device = first.target_scale.device
        self.sums = (
            torch.zeros(3, first.num_targets, dtype=torch.float64, device=device),
            torch.zeros(1, dtype=torch.float64, device=device),
        )

    @staticmethod
    def measures(aligner: KVAligner, target: nn.Module) -> bool:
        """Whether ``aligner`` maps keys or values, and ``target`` has output projections that are known."""
        maps = all(name in PARTS and part.regresses for name, part in aligner.named_parts().items())
        return maps and all(output_projection(attention) is not None for attention in attention_modules(target))

    def watch(self) -> KVCapture:
        """The context in which the target's forward is to run, for :meth:`update`."""
        return KVCapture(self._body, query_rows="all")

    @torch.no_grad()
    def update(
        self, student: KVStates, teacher: KVStates, watched: KVCapture, selection: Selection, real: Tensor
    ) -> None:
        """Add one batch.

        Args:
            student: At all positions, as they are aligned.
            teacher: The same.
            watched: Of :meth:`watch`, after the target's forward of that batch.
            selection: Positions whose keys and values are projected.
            real: ``[B, T]`` bool, tokens that are no padding.
        """
        chosen = selection.at(real.shape[1])
        if not chosen.any():
            return
        everywhere = Selection(None, chosen)
        mapped: dict[str, Tensor] = {}
        for name, part in self._aligner.named_parts().items():
            source, _ = part.sides(getattr(student, f"{name}s"), getattr(teacher, f"{name}s"))
            rows = selected_rows(source, everywhere)
            mapped[name] = part.projected(rows.to(torch.promote_types(torch.float32, rows.dtype)))
        for place, layer in enumerate(self._layers):
            keys, values = (mapped[name][place] if name in mapped else None for name in ("key", "value"))
            if values is not None:
                values = self._plain_values(layer, values)
            self._add(place, watched.observed[layer], watched.states.values[layer], (keys, values), chosen, real)
        self.sums[1].add_(real.sum())

    def _add(
        self, place: int, own: ObservedLayer, own_values: Tensor, mapped: tuple[Tensor | None, Tensor | None],
        chosen: Tensor, real: Tensor,
    ) -> None:  # fmt: skip
        wide = torch.promote_types(torch.float32, own_values.dtype)
        hidden = ~real[:, None, :, None]
        values = own_values.to(wide).masked_fill(hidden, 0)  # what padding holds may be NaN
        other_values = values if mapped[1] is None else _placed(values, mapped[1], chosen)
        found = attention_chunks(own, real)
        pairs: Iterable[tuple[tuple[slice, Tensor], tuple[slice, Tensor]]]
        if mapped[0] is None:
            pairs = ((part, part) for part in found)
        else:
            changed_keys = self._with_keys(own, mapped[0], chosen)
            pairs = zip(found, attention_chunks(changed_keys, real), strict=True)
        for (asking, weights), (_, changed) in pairs:
            wanted = _mixed(weights, values)
            difference = self._output(place, _mixed(changed, other_values) - wanted)
            output = self._output(place, wanted)
            counts = real[:, asking, None]
            cosines = torch.cosine_similarity(output + difference, output, dim=-1)
            sums = (difference.square(), output.square(), cosines[..., None])
            self.sums[0][:, place] += torch.stack([part.masked_fill(~counts, 0).sum() for part in sums])

    def result(self) -> dict[str, list[float]]:
        """``relative_error`` and ``cosine``, each with a number per target layer; empty without text."""
        (error, output, cosine), count = self.sums
        if not count > 0:
            return {}
        return {"relative_error": (error / output.clamp_min(1e-300)).tolist(), "cosine": (cosine / count).tolist()}

    def _with_keys(self, own: ObservedLayer, mapped: Tensor, chosen: Tensor) -> ObservedLayer:
        """The layer with projected keys, which are rotated already where the aligned ones are."""
        if own.rotation is None or self._rope == "pre":
            return replace(own, unrotated_keys=_placed(own.unrotated_keys, mapped, chosen))
        return ObservedLayer(
            own.queries(), _placed(own.keys(), mapped, chosen), None, own.scaling, own.sliding_window, own.softcap
        )

    def _output(self, place: int, heads: Tensor) -> Tensor:
        """What the output projection makes of ``[B, q, heads · D]``, without its bias, fp64."""
        module = self._projections[self._layers[place]]
        assert module is not None
        inputs = heads.to(next(self._body.parameters()).dtype)
        return module(inputs).double() - module(torch.zeros_like(inputs[:1, :1])).double()


def _placed(own: Tensor, mapped: Tensor, chosen: Tensor) -> Tensor:
    """``own [B, H, T, D]`` with rows ``[N, H, D]`` in place of those at ``chosen [B, T]``."""
    placed = own.to(torch.promote_types(torch.float32, own.dtype)).transpose(1, 2).clone()
    placed[chosen] = mapped.to(placed.dtype)
    return placed.transpose(1, 2)


def _mixed(weights: Tensor, values: Tensor) -> Tensor:
    """``[B, H, G, q, stop]`` of ``values [B, H, T, D]`` → ``[B, q, H·G·D]``."""
    mixed = weights @ values[:, :, None, : weights.shape[-1]]
    return mixed.permute(0, 3, 1, 2, 4).flatten(2)
