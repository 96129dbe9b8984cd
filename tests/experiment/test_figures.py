"""Pictures can be read: few lines in one pair of axes, labels whole, and parts of a step that somebody timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks.train_step.report import stacked_parts
from kvds.align.figures import save_spectra
from kvds.experiment.figures import save_arms, save_learning_curves


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, laid out."""
    figures: list[Figure] = []

    def keep(self: Figure, *_: Any, **__: Any) -> None:
        self.draw_without_rendering()
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_many_arms_are_dealt_out_to_rows_on_the_scales_of_all(drawn: list[Figure]) -> None:
    curve = {"exact_match": [[1, 2], [0.1, 0.2]], "cross_entropy": [[1, 2], [3.0, 2.0]]}
    arms = {f"arm_{n:02d}": {0: {"curves": {**curve, "loss/task": [[1, 2], [n + 1.0, 1.0]]}}} for n in range(24)}
    save_learning_curves(arms, Path("x.png"))
    axes = drawn[0].axes
    assert len(axes) == 4 * 3 and max(len(axis.lines) for axis in axes) == 7
    legends = [axis.get_legend() for axis in axes if axis.get_legend() is not None]
    told = [text.get_text() for legend in legends for text in legend.get_texts()]
    assert told == list(arms)
    limits = [axis.get_ylim() for axis in axes[2::3]]
    assert all(limit == limits[0] for limit in limits)


def test_no_label_of_arms_is_cut(drawn: list[Figure]) -> None:
    arms = {f"an_arm_with_a_long_name_{n}": [1.0, 2.0] for n in range(3)}
    save_arms(
        arms, "AUC of exact match over the second half of training (%)", dict.fromkeys(arms, (1, 2)), Path("x.png")
    )
    [figure] = drawn
    whole, [axis] = figure.bbox, figure.axes
    for text in (axis.xaxis.label, *axis.get_yticklabels(), *figure.legends[0].get_texts()):
        box = text.get_window_extent()
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0, text.get_text()


def test_few_maps_are_lines_and_many_are_colours(drawn: list[Figure]) -> None:
    values = np.exp(-np.arange(8.0)).tolist()
    save_spectra({"key": {"singular_values": [values] * 24}, "value": {"singular_values": [values] * 4}}, "x.png")
    key, value = drawn[0].axes[:2]
    assert not key.lines and key.images[0].get_array().shape == (24, 8)
    assert len(value.lines) == 4 and not value.images


def test_a_step_that_nobody_took_apart_is_no_forward() -> None:
    zero = {"seconds_teacher": 0.0, "seconds_align": 0.0, "seconds_backward": 0.0, "seconds_optimizer": 0.5}
    own = {**zero, "seconds_teacher": 1.0, "seconds_forward": 3.0, "seconds_align": 0.25, "seconds_backward": 4.0}
    assert stacked_parts([own, {**zero, "seconds_forward": 7.0}]) == {
        "teacher": [1.0, 0.0], "student forward": [2.75, 0.0], "alignment forward": [0.25, 0.0],
        "backward": [4.0, 0.0], "whole step, parts not timed": [0.0, 7.0], "optimizer": [0.5, 0.5],
    }  # fmt: skip
