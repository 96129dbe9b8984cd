"""Diagnostics of an aligner and of the student's keys and values: counts, ranks, norms, mixing weights, pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvds.align.aligner import KVAligner
from kvds.align.build import ALIGNERS
from kvds.align.loss import parts_of
from kvds.align.structured import MapProjectionPart
from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.settings import AlignmentSettings
from kvds.kv import KVShape


def covariance(rows: Tensor, kept: Tensor) -> Tensor:
    """Sums of products of the centred rows, in fp32 at least, ``[D, D]``.

    Args:
        rows: ``[N, D]``.
        kept: ``[N]`` bool, the rows that count; of the others nothing is used, be it NaN. How many count is not asked.
    """
    rows = torch.where(kept[:, None], rows.to(torch.promote_types(torch.float32, rows.dtype)), 0.0)
    mean = rows.sum(0) / kept.sum().clamp_min(1)
    centred = torch.where(kept[:, None], rows - mean, 0.0)
    return centred.T @ centred


def effective_ranks(covariances: Tensor) -> Tensor:
    """``exp(H(λ / Σλ))`` of the eigenvalues λ of ``[L, D, D]``: how many directions the rows really use, ``[L]``.

    Between 1 and D; 0 where the rows do not vary.

    Source: Roy and Vetterli, The effective rank (2007).
    """
    eigenvalues = torch.linalg.eigvalsh(covariances).clamp_min(0)
    total = eigenvalues.sum(1)
    share = eigenvalues / total.clamp_min(1e-30)[:, None]
    entropy = -(share * share.clamp_min(1e-30).log()).sum(1)
    return torch.where(total > 0, entropy.exp(), 0.0)


def effective_rank(rows: Tensor) -> Tensor:
    """Of rows ``[N, D]`` that all count: a scalar, as of :func:`effective_ranks`."""
    return effective_ranks(covariance(rows, rows.new_ones(len(rows), dtype=torch.bool))[None])[0]


def kv_norm(layers: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Root mean square of a token's norm over heads and dimensions, over layers and selected tokens; 0 where none is.

    Args:
        layers: Per layer ``[B, H, M, D]``.
        mask: ``[B, M]`` bool.
    """
    squares = torch.stack([layer.float().square().sum((1, 3)) for layer in layers])  # [L, B, M]
    selected = torch.where(mask, squares, squares.new_zeros(()))
    return (selected.sum() / (mask.sum().clamp_min(1) * len(layers))).sqrt()


def parameter_counts(student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> dict[str, int]:
    """Learned numbers of each alignment for a pair of models, under otherwise the same settings.

    Modes other than that of ``settings`` are counted with their own default layer map; all with its parts, but those
    that take no others than theirs. Left out is what would read hidden states of a width that the shapes do not say.
    """
    chosen = "".join(part[0] for part in parts_of(settings))
    counts = {}
    for name, aligner in ALIGNERS.items():
        mode = ALIGNMENT_MODES[name]
        if not all(aligner.map_widths(student, teacher)):
            continue
        own = dataclasses.replace(
            settings.alignment(), alignment_mode=name, map_proj_share_dim=False,
            layer_map=settings.layer_map if name == settings.alignment_mode else None,
            kv_parts="auto" if "kv_parts" in mode.only else chosen,
            layer_groups=settings.layer_groups if mode.grouped else 1,
            head_groups=settings.head_groups if mode.grouped else 1,
        )  # fmt: skip
        counts[name] = aligner.parameter_count(student, teacher, own)
        if mode.shares_dim:
            shared = dataclasses.replace(own, map_proj_share_dim=True)
            counts[f"{name}, share_dim"] = aligner.parameter_count(student, teacher, shared)
    return counts


@torch.no_grad()
def describe_aligner(aligner: KVAligner) -> dict[str, Any]:
    """Shapes and counts of its parameters, and for each row of a mix its strongest source and its entropy in nats."""
    parts = {}
    for name, part in aligner.named_parts().items():
        mix = part.layer_mix().float()
        entropy = -(mix * mix.clamp_min(1e-30).log()).sum(1)
        parts[name] = {
            "parameters": {key: tuple(value.shape) for key, value in part.named_parameters()},
            "layer_mix_argmax": mix.argmax(1).tolist(),
            "layer_mix_entropy": [round(abs(value), 4) for value in entropy.tolist()],
            "layer_pairs": part.pairs,
        }
        if isinstance(part, MapProjectionPart):
            # Head weights may be of either sign: the strongest is the largest in size.
            parts[name]["head_mix_argmax"] = part.head_weights().abs().argmax(-1).tolist()
    settings = aligner.settings
    return {
        "alignment_mode": settings.alignment_mode,
        "direction": settings.direction,
        "student": dataclasses.asdict(aligner.student_shape),
        "teacher": dataclasses.asdict(aligner.teacher_shape),
        "parameters": sum(p.numel() for p in aligner.parameters()),
        "parts": parts,
    }


@torch.no_grad()
def save_heatmaps(aligner: KVAligner, path: str | Path) -> Path:
    """Draw layer mix and, where there is one, head mix of each part as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    to_teacher = aligner.settings.direction == "student_to_teacher"
    source, target = ("student", "teacher") if to_teacher else ("teacher", "student")
    panels: list[tuple[str, Tensor, str, str]] = []
    for name, part in aligner.named_parts().items():
        row = f"{target} layer" if part.pairs is None else "student layer"
        panels.append((f"{name}: layer mix", part.layer_mix(), f"{source} layer", row))
        if isinstance(part, MapProjectionPart):
            per_layer = part.head_mix.dim() == 3
            title = f"{name}: head mix, mean over layers" if per_layer else f"{name}: head mix"
            panels.append((title, part.head_weights().mean(0), f"{source} KV head", f"{target} KV head"))
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, values, x_label, y_label) in zip(axes[0], panels, strict=True):
        image = axis.imshow(values.float().cpu().numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis, shrink=0.85)
    figure.savefig(path, dpi=130)
    return Path(path)
