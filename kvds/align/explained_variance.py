"""Explained variance: how well the maps explain the target on given text, R² and loss of each target layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvds.align.aligner import KVAligner
from kvds.align.aligner_part import AlignerPart
from kvds.kv import Selection, States, gather_positions


class ExplainedVariance:
    """Sums over batches; ``R²_i = 1 − Σ ‖projected_i − target_i‖² / Σ ‖target_i − mean target_i‖²``.

    The mean is that of each channel over all the text given: 0 is what a constant would reach, 1 a perfect map, and a
    map fitted elsewhere can fall below 0. Alignments that regress on nothing (relation, structural_kv) have no R², and
    are told by their loss.

    Args:
        aligner: Whole, on the device of the states.
    """

    def __init__(self, aligner: KVAligner) -> None:
        self._aligner = aligner
        self._sums: dict[str, dict[str, Any]] = {name: {} for name in aligner.parts}

    @torch.no_grad()
    def update(self, student: States, teacher: States, selection: Selection) -> None:
        """Add one batch. A batch without a selected position adds nothing."""
        count = int(selection.mask.sum())
        if not count:
            return
        self._aligner.check_states(student, teacher)
        losses = self._aligner(student, teacher, selection)
        own = {"key": losses.key_layers, "value": losses.value_layers}
        for name, part in self._aligner.named_parts().items():
            sides = getattr(student, f"{name}s"), getattr(teacher, f"{name}s")
            layers = own.get(name)
            found = {"count": torch.tensor(float(count))}
            if layers is not None:
                found["loss"] = layers.double() * count
            if part.regresses:
                found |= _squares(part, sides, selection, count)
            total = self._sums[name]
            for key, value in found.items():
                total[key] = total[key] + value if key in total else value

    def result(self) -> dict[str, dict[str, list[float]]]:
        """Part → ``r2`` and ``loss``, each with a number per target layer, where there is one; empty without text."""
        results: dict[str, dict[str, list[float]]] = {}
        for name, sums in self._sums.items():
            if not sums:
                continue
            found = results.setdefault(name, {})
            if "loss" in sums:
                found["loss"] = (sums["loss"] / sums["count"]).tolist()
            if "residual" in sums:
                varied = (sums["y²"] - sums["y"].square() / sums["count"]).sum((1, 2))
                explained = 1 - sums["residual"] / varied.clamp_min(1e-300)
                found["r2"] = torch.where(varied > 0, explained, torch.full_like(explained, float("nan"))).tolist()
        return results


def _squares(
    part: AlignerPart, sides: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], selection: Selection, count: int
) -> dict[str, Tensor]:
    """Σ residual² ``[L_y]`` and, per channel, Σ target and Σ target² ``[L_y, H, D]`` in the target's own unit, fp64."""
    penalty, part.loss_name = part.loss_name, "mse"
    try:
        layers = part(*sides, selection.index, selection.mask)[1]
    finally:
        part.loss_name = penalty
    _, target = part.sides(*sides)
    rows = torch.stack([gather_positions(y, selection.index).transpose(1, 2)[selection.mask] for y in target]).double()
    elements = count * rows[0, 0].numel()
    return {
        "residual": layers.double() * elements * part.target_scale.double().square(),
        "y": rows.sum(1),
        "y²": rows.square().sum(1),
    }
