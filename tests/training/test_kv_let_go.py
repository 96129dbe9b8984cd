"""When a run gives up its KV loss, from what it has measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvds.config.recipe import parse_run_config
from kvds.distillation.calibration import nothing_mapped
from kvds.training.kv_let_go import KVLetGo


@pytest.mark.parametrize(
    ("total", "expected"),
    [(39, []), (40, []), (41, [40]), (189, [40, 80, 120, 160]), (900, [100, 200, 300, 400, 500, 600, 700, 800])],
)
def test_it_asks_a_few_times_and_not_too_often(total: int, expected: list[int]) -> None:
    asks = KVLetGo(total, measures=True)
    assert [step for step in range(total + 1) if asks.due(step)] == expected
    assert not any(KVLetGo(total, measures=False).due(step) for step in range(total + 1))


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([0.1, 0.0, 0.2], [False, False, False]),
        ([-0.1, 0.1, -0.1], [False, False, False]),
        ([0.2, -1e-4, -1e-4], [False, False, True]),
        ([-0.1, math.nan, -0.1], [False, False, True]),
    ],
)
def test_twice_in_a_row_is_the_end(measured: list[float], expected: list[bool]) -> None:
    straight, resumed = KVLetGo(900, measures=True), KVLetGo(900, measures=True)
    assert [straight.note(agreement) for agreement in measured] == expected
    for agreement, end in zip(measured, expected, strict=True):
        following = KVLetGo(900, measures=True)
        following.restore(resumed.state)
        resumed = following
        assert resumed.note(agreement) == end


def test_maps_of_which_one_explains_something_are_kept() -> None:
    assert not nothing_mapped([]) and not nothing_mapped([{}])  # nothing was fitted
    assert nothing_mapped([{"key": [0.0, 0.0], "value": [-0.01, 0.0]}])
    assert not nothing_mapped([{"key": [0.0, 0.0]}, {"key": [0.0, 0.02]}])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, True),
        ({"kv_weight": "hold:0.5"}, True),
        ({"kv_weight": "balance:0.5"}, True),
        ({"kv_weight": 1.5}, False),  # taken at its word
        ({"kv_let_go": "false"}, False),
        ({"alignment_mode": "none"}, False),
    ],
)
def test_a_number_is_taken_at_its_word(flags: dict[str, Any], expected: bool) -> None:
    values = {"model_name": "m", "teacher_name": "t", "output_dir": "o", **flags}
    cfg = parse_run_config([token for key, value in values.items() for token in (f"--{key}", str(value))])
    assert cfg.lets_go is expected
