"""Pictures of what an aligner learned: spectra of its maps, and how well they fit before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_LINES = 6  # more in one pair of axes are told apart by nobody
_MEASURES = {"r2": "R²", "relative_error": "relative error", "loss": "loss"}


def save_spectra(spectra: dict[str, dict[str, Any]], path: str | Path) -> Path:
    """Draw the singular values of :func:`kvds.align.spectrum.map_spectra`: few as lines, many as rows of colour."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(4.6 * len(spectra), 3.8), layout="constrained")
    axes = figure.subplots(1, len(spectra), squeeze=False)[0]
    for axis, (name, found) in zip(axes, spectra.items(), strict=True):
        maps = found["singular_values"]
        least = min((value for values in maps for value in values if value > 0), default=None)  # None: maps of nothing
        axis.set(title=f"{name}: dimension maps", xlabel="direction")
        if len(maps) <= _LINES:
            for number, values in enumerate(maps):
                places = range(1, len(values) + 1)
                axis.plot(places, values, label=f"map {number}", linewidth=1, marker="." if len(values) < 9 else "")
            axis.set(ylabel="singular value", yscale="linear" if least is None else "log")
            axis.legend(fontsize=8)
        else:
            edges = (0.5, len(maps[0]) + 0.5, len(maps) - 0.5, -0.5)
            norm = None if least is None else LogNorm(vmin=least)
            image = axis.imshow(maps, aspect="auto", extent=edges, norm=norm, interpolation="nearest")
            axis.set(ylabel="map, by target layer")
            axis.yaxis.get_major_locator().set_params(integer=True)
            figure.colorbar(image, ax=axis, label="singular value")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=130)
    return Path(path)


def save_fit(fit: dict[str, dict[str, dict[str, list[float]]]], path: str | Path) -> Path:
    """Draw R² (or the loss, where there is none) of each target layer, and the error of the attention output.

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
        measure = next(one for one in _MEASURES if one in next(iter(fit.values()))[part])
        for when, found in fit.items():
            values = found[part].get(measure, [])
            axis.plot(range(len(values)), values, marker="o", label=when)
        axis.set(title=f"{part}, held-out text", xlabel="target layer", ylabel=_MEASURES[measure])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    figure.savefig(path, dpi=130)
    return Path(path)
