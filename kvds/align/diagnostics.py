"""What an aligner has learned and how the student's keys and values fare: ranks, norms, mixing weights, pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvds.kv import KVShape


def effective_rank(rows: Tensor) -> Tensor:
    """``exp(H(λ / Σλ))`` of the covariance's eigenvalues λ: how many directions the rows really use.

    Args:
        rows: ``[N, D]``.

    Returns:
        Scalar between 1 and D; 0 where the rows do not vary.

    Source: Roy and Vetterli, The effective rank (2007).
    """
    centred = rows.float() - rows.float().mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0)
    total = eigenvalues.sum()
    share = eigenvalues / total.clamp_min(1e-30)
    entropy = -(share * share.clamp_min(1e-30).log()).sum()
    return torch.where(total > 0, entropy.exp(), torch.zeros_like(entropy))


def kv_norm(layers: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Root mean square, over layers and selected tokens, of a token's norm over heads and dimensions.

    Args:
        layers: Per layer ``[B, H, T, D]``.
        mask: ``[B, T]`` bool.
    """
    squares = [layer.float().square().sum((1, 3)) for layer in layers]
    count = mask.sum().clamp_min(1)
    return torch.stack([torch.where(mask, s, s.new_zeros(())).sum() / count for s in squares]).mean().sqrt()


def parameter_counts(student: KVShape, teacher: KVShape, settings: Any) -> dict[str, int]:
    """Learned parameters of each alignment for a pair of models."""
    from kvds.align import build_aligner

    counts = {}
    for name, mode, share in (
        ("flat", "flat", False),
        ("structured", "structured", False),
        ("structured, share_dim", "structured", True),
    ):
        layer_map = settings.layer_map if mode == settings.alignment_mode else None
        groups = (
            {"layer_groups": settings.layer_groups, "head_groups": settings.head_groups}
            if mode == "structured"
            else {"layer_groups": 1, "head_groups": 1}
        )
        fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
        chosen = type(settings)(
            **{**fields, "alignment_mode": mode, "map_proj_share_dim": share, "layer_map": layer_map, **groups}
        )
        counts[name] = sum(p.numel() for p in build_aligner(student, teacher, chosen).parameters())
    return counts


@torch.no_grad()
def describe_aligner(aligner: nn.Module) -> dict[str, Any]:
    """Shapes and counts of its parameters, and for each row of the layer mix its strongest source and its entropy in
    nats.
    """
    parts = {}
    for name, part in aligner.parts.items():  # type: ignore[operator, union-attr]
        mix = part.layer_mix().float()
        entropy = -(mix * mix.clamp_min(1e-30).log()).sum(1)
        parts[name] = {
            "parameters": {key: tuple(value.shape) for key, value in part.named_parameters()},
            "layer_mix_argmax": mix.argmax(1).tolist(),
            "layer_mix_entropy": [round(value, 4) for value in entropy.tolist()],
            "layer_pairs": part.pairs,
        }
    settings: Any = aligner.settings
    return {
        "alignment_mode": settings.alignment_mode,
        "direction": settings.direction,
        "student": dataclasses.asdict(aligner.student_shape),  # type: ignore[call-overload]
        "teacher": dataclasses.asdict(aligner.teacher_shape),  # type: ignore[call-overload]
        "parameters": sum(p.numel() for p in aligner.parameters()),
        "parts": parts,
    }


@torch.no_grad()
def save_heatmaps(aligner: nn.Module, path: str | Path) -> Path:
    """Draw layer mix and, where there is one, head mix of each part as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: list[tuple[str, Tensor, str, str]] = []
    to_teacher = aligner.settings.direction == "student_to_teacher"  # type: ignore[union-attr]
    source, target = ("student", "teacher") if to_teacher else ("teacher", "student")
    for name, part in aligner.parts.items():  # type: ignore[operator, union-attr]
        panels.append((f"{name}: layer mix", part.layer_mix(), f"{source} layer", f"{target} layer"))
        if hasattr(part, "head_mix"):
            mix = part.head_mix if part.head_mix.dim() == 2 else part.head_mix.mean(0)
            title = f"{name}: head mix" if part.head_mix.dim() == 2 else f"{name}: head mix, mean over layers"
            panels.append((title, mix, f"{source} KV head", f"{target} KV head"))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8), squeeze=False, layout="constrained")
    for axis, (title, values, x_label, y_label) in zip(axes[0], panels, strict=True):
        image = axis.imshow(values.float().cpu().numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axis, shrink=0.85)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return Path(path)
