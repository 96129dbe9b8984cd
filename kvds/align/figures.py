"""Pictures of what an aligner learned: spectra of its maps, and how well they fit before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_LINES = 6  # more in one pair of axes are told apart by nobody


def save_spectra(spectra: dict[str, dict[str, Any]], path: str | Path) -> Path:
    """Draw the singular values of :func:`kvds.align.spectrum.map_spectra`: few as lines, many as rows of colour."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(4.6 * len(spectra), 3.8), layout="constrained")
    axes = figure.subplots(1, len(spectra), squeeze=False)[0]
    for axis, (name, found) in zip(axes, spectra.items(), strict=True):
        maps = found["singular_values"]
        axis.set(title=f"{name}: dimension maps", xlabel="direction")
        if len(maps) <= _LINES:
            for number, values in enumerate(maps):
                places = range(1, len(values) + 1)
                axis.plot(places, values, label=f"map {number}", linewidth=1, marker="." if len(values) < 9 else "")
            axis.set(ylabel="singular value", yscale="log")
            axis.legend(fontsize=8)
        else:
            edges = (0.5, len(maps[0]) + 0.5, len(maps) - 0.5, -0.5)
            least = min(value for values in maps for value in values if value > 0)
            image = axis.imshow(maps, aspect="auto", extent=edges, norm=LogNorm(vmin=least), interpolation="nearest")
            axis.set(ylabel="map, by target layer")
            axis.yaxis.get_major_locator().set_params(integer=True)
            figure.colorbar(image, ax=axis, label="singular value")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=130)
    return Path(path)


def save_fit(fit: dict[str, dict[str, dict[str, list[float]]]], path: str | Path) -> Path:
    """Draw R² (or the loss, where there is none) of each target layer.

    Args:
        fit: ``"before"`` and ``"after"`` (or one of them) → part → measure → a number per layer, as
            :meth:`kvds.align.explained_variance.ExplainedVariance.result` gives it.
        path: The PNG to write.
    """
    from matplotlib.figure import Figure

    parts = list(next(iter(fit.values())))
    figure = Figure(figsize=(4.2 * max(1, len(parts)), 3.6), layout="constrained")
    axes = figure.subplots(1, max(1, len(parts)), squeeze=False)[0]
    for axis, part in zip(axes, parts, strict=False):
        measure = "r2" if "r2" in next(iter(fit.values()))[part] else "loss"
        for when, found in fit.items():
            values = found[part].get(measure, [])
            axis.plot(range(len(values)), values, marker="o", label=when)
        axis.set(title=f"{part}, held-out text", xlabel="target layer", ylabel="R²" if measure == "r2" else "loss")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    figure.savefig(path, dpi=130)
    return Path(path)
