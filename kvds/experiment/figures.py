"""Pictures of an experiment: the primary metric per arm with every seed, and learning curves with their spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvds.experiment.results import Row
from kvds.experiment.statistics import bootstrap_interval

# More lines than this in one pair of axes are told apart by nobody.
_ARMS_IN_A_ROW = 7


def save_arms(
    numbers: Mapping[str, Sequence[float]], title: str, intervals: Mapping[str, tuple[float, float]], path: Path
) -> None:
    """One row per arm: a dot per seed, the mean, and the interval of the mean as a bar."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(7.5, 1.4 + 0.36 * len(numbers)), dpi=130, layout="constrained")
    axis = figure.subplots()
    for row, (arm, values) in enumerate(numbers.items()):
        finite = [number for number in values if math.isfinite(number)]
        if not finite:
            continue
        low, high = intervals[arm]
        axis.plot(finite, [row] * len(finite), "o", color="#0072B2", alpha=0.45, markersize=4.5)
        if math.isfinite(low):
            axis.plot([low, high], [row + 0.22] * 2, color="#D55E00", linewidth=2.2)
        axis.plot([float(np.mean(finite))], [row + 0.22], "D", color="#D55E00", markersize=5)
    axis.set_yticks(range(len(numbers)), list(numbers))
    axis.invert_yaxis()
    axis.set_xlabel(title)
    # Not in the label, which would be cut where it is longer than the axis.
    shown = [
        Line2D([], [], marker="o", linestyle="none", color="#0072B2", alpha=0.45, label="a seed"),
        Line2D([], [], marker="D", color="#D55E00", label="mean and its 95 % interval"),
    ]
    figure.legend(handles=shown, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    axis.grid(True, axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def save_learning_curves(arms: Mapping[str, Mapping[int, Row]], path: Path) -> None:
    """Exact match, dev cross entropy and training loss over steps: mean over seeds, band of its 95 % interval.

    A row of axes holds a few arms, on the scales of all.
    """
    from matplotlib.figure import Figure

    panels = [("exact_match", "dev exact match (%)", 100.0), ("cross_entropy", "dev cross entropy (nats/token)", 1.0),
              ("loss/task", "training task loss (nats/token)", 1.0)]  # fmt: skip
    found = [row.get("curves", {}).get("exact_match", [[], []])[1] for seeds in arms.values() for row in seeds.values()]
    if not any(any(curve) for curve in found):  # a task that is too hard for all of them
        del panels[0]
    names = list(arms)
    rows = [names[begin : begin + _ARMS_IN_A_ROW] for begin in range(0, len(names), _ARMS_IN_A_ROW)] or [[]]
    figure = Figure(figsize=(5 * len(panels) + 2, 0.6 + 3.4 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots(len(rows), len(panels), squeeze=False, sharex=True, sharey="col")
    for row, shown in enumerate(rows):
        for axis, (key, label, factor) in zip(axes[row], panels, strict=True):
            for position, arm in enumerate(shown):
                steps, values = aligned_curves([seed.get("curves", {}).get(key) for seed in arms[arm].values()])
                if not len(steps):
                    continue
                colour = f"C{position}"
                axis.plot(steps, factor * values.mean(0), label=arm, color=colour)
                if len(values) > 1:
                    band = np.array([bootstrap_interval(column) for column in factor * values.T])
                    axis.fill_between(steps, band[:, 0], band[:, 1], color=colour, alpha=0.12, linewidth=0)
            axis.grid(True, alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if key != "exact_match":
                axis.set_yscale("log")
            if row == 0:
                axis.set_title(label, fontsize=10)
            if row == len(rows) - 1:
                axis.set_xlabel("optimizer step")
        found = [axis.get_legend_handles_labels() for axis in axes[row]]
        axes[row][-1].legend(
            *max(found, key=lambda each: len(each[1])), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8
        )
    figure.savefig(path, metadata={"Software": None})


def aligned_curves(curves: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all given curves have, and their values ``[seeds, steps]``; curves that are missing are left out."""
    found = [dict(zip(*curve, strict=True)) for curve in curves if curve]
    steps = sorted(set.intersection(*(set(curve) for curve in found))) if found else []
    values = [[math.nan if curve[step] is None else curve[step] for step in steps] for curve in found]
    return np.array(steps), np.array(values, dtype=np.float64).reshape(len(found), len(steps))
