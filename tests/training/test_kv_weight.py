"""The weight of the KV loss: where it starts, how it falls, how it is held, and what a checkpoint keeps of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvds.config.recipe import parse_run_config
from kvds.training.kv_weight import KVWeight, held_weight


def weight_of(**flags: Any) -> KVWeight:
    flags = {"model_name": "m", "teacher_name": "t", "output_dir": "o", **flags}
    return KVWeight(parse_run_config([token for key, value in flags.items() for token in (f"--{key}", str(value))]))


def never(share: float) -> float:
    raise AssertionError(f"nothing is to be calibrated, and was for {share}")


def test_a_number_is_taken_as_it_is() -> None:
    weight = weight_of(kv_weight=2.5)
    assert weight.value == 0.0
    weight.begin(never)
    assert weight.state == {"kv_weight": 2.5, "start_kv_weight": 2.5, "kv_let_go": None}


@pytest.mark.parametrize("flags", [{"alignment_mode": "none", "kv_weight": 3}, {"kv_weight": 0}])
def test_without_keys_and_values_it_stays_zero(flags: dict[str, Any]) -> None:
    weight = weight_of(**flags)
    weight.begin(never)
    assert weight.state == {"kv_weight": 0.0, "start_kv_weight": 0.0, "kv_let_go": None}
    assert weight.at(3, 4) == 0.0 and weight.part(3, 4) == 1.0


@pytest.mark.parametrize("kind", ["auto", "hold"])
def test_a_share_is_calibrated(kind: str) -> None:
    weight = weight_of(kv_weight=f"{kind}:0.25")
    weight.begin(lambda share: 8 * share)
    assert weight.state == {"kv_weight": 2.0, "start_kv_weight": 2.0, "kv_let_go": None}


def test_a_constant_weight_is_the_same_at_each_step() -> None:
    weight = weight_of(kv_weight=2.5)
    weight.begin(never)
    assert [weight.at(step, 4) for step in range(4)] == [2.5] * 4


def test_a_linear_weight_falls_to_its_last_part() -> None:
    weight = weight_of(kv_weight=2.0, kv_weight_schedule="linear")
    weight.begin(never)
    assert [weight.at(step, 4) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert [weight.part(step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert weight.value == 2.0


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [2.0, 2.0, 2.0, 0.0, 0.0]), ("linear", [2.0, 1.2, 0.4, 0.0, 0.0])]
)
def test_keys_and_values_first_and_then_the_task_alone(schedule: str, expected: list[float]) -> None:
    weight = weight_of(kv_weight=2.0, kv_weight_schedule=schedule, kv_weight_until=0.5)
    weight.begin(never)
    assert [weight.at(step, 5) for step in range(5)] == pytest.approx(expected)
    assert weight.part(3, 5) == 0.0


def test_what_is_let_go_is_zero_from_then_on_and_after_a_resume() -> None:
    weight, again = weight_of(kv_weight="hold:0.5"), weight_of(kv_weight="hold:0.5")
    weight.begin(lambda share: 2.0)
    assert weight.ended is None
    weight.let_go(3)
    weight.hold({"kv/gradient_ratio": 0.4})
    again.restore(weight.state)
    for each in (weight, again):
        assert [each.at(step, 9) for step in range(5)] == [2.0, 2.0, 2.0, 0.0, 0.0] and each.ended == 3


def test_a_balanced_weight_follows_the_losses_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches on each of two ranks: the other rank's sums are those of this one once more, doubled."""
    monkeypatch.setattr("kvds.training.kv_weight.all_reduce_sum", lambda sums: sums.mul_(3.0))
    flags = {"kv_weight": "balance:0.5", "task_weight": 2.0, "logit_kd_weight": 3.0}
    weight, again = weight_of(**flags), weight_of(**flags)
    weight.begin(lambda share: 7.0)
    assert float(weight.at(0, 8)) == 7.0
    for task, kd, kv in ((1.0, 0.5, 0.2), (3.0, 1.5, 0.6)):
        metrics = {"loss/task": task, "loss/logit_kd": kd, "loss/kv": kv}
        weight.note({name: torch.tensor(value) for name, value in metrics.items()}, 0.25)
    weight.end_step()
    assert float(weight.at(1, 8)) == pytest.approx(0.5 * (2 * 4.0 + 3 * 2.0) / 0.8)
    weight.end_step()  # a step that noted nothing
    weight.note({"loss/task": torch.tensor(1.0), "loss/kv": torch.tensor(math.nan)}, 1.0)
    weight.end_step()
    assert float(weight.at(2, 8)) == pytest.approx(0.5 * 14.0 / 0.8)
    again.restore(weight.state)
    assert torch.equal(torch.as_tensor(again.at(3, 8)), torch.as_tensor(weight.at(3, 8)))


def test_only_a_held_weight_moves() -> None:
    measured = {"kv/gradient_ratio": 0.4}
    fixed, calibrated, held = (weight_of(kv_weight=value) for value in ("2", "auto:0.5", "hold:0.5"))
    for weight in (fixed, calibrated, held):
        weight.begin(lambda share: 2.0)
        weight.hold({"loss/kv": 1.0})  # a logging step that measured no gradient
        assert weight.value == 2.0
        weight.hold(measured)
    assert fixed.value == calibrated.value == 2.0
    assert held.value == held_weight(2.0, 0.4, 0.5, 2.0) == pytest.approx(2 * 0.5 / 0.4)  # at once
    held.hold(measured)
    assert held.value == pytest.approx(2.5 * math.sqrt(1.25))  # from then on by and by


def test_a_restored_weight_goes_on_where_it_was() -> None:
    first, again = weight_of(kv_weight="hold:0.5"), weight_of(kv_weight="hold:0.5")
    first.begin(lambda share: 2.0)
    for _ in range(30):  # far enough for the bound that the start sets
        first.hold({"kv/gradient_ratio": 1e-3})
    again.restore({"step": 30, **first.state})
    assert again.state == first.state == {"kv_weight": 200.0, "start_kv_weight": 2.0, "kv_let_go": None}
    for weight in (first, again):
        weight.hold({"kv/gradient_ratio": 1e-3})
    assert again.value == first.value == 200.0


@given(st.floats(1e-3, 1e3), st.floats(1e-2, 10), st.floats(0, 3), st.floats(0.05, 20))
def test_the_share_is_taken_at_once_and_kept_by_and_by(
    start: float, share: float, slope: float, sensitivity: float
) -> None:
    weight = start
    # What the KV loss sends back grows with its weight; what it sends through the network counts with the rest.
    scale = sensitivity / start

    def ratio(weight: float) -> float:
        return scale * weight / (1 + 0.05 * slope * scale * weight)

    reachable = share * 1.01 < 1 / max(0.05 * slope, 1e-12) and 1 / 90 < share / sensitivity < 30
    for _ in range(80):
        following = held_weight(weight, ratio(weight), share, start)
        measured = ratio(weight)
        if weight == start:
            aim = min(max(start * share / measured, start / 100), start * 100)
            assert following == pytest.approx(aim)
        else:
            assert 0.8 - 1e-9 <= following / weight <= 1.25 + 1e-9
        weight = following
        assert start / 100.001 <= weight <= start * 100.001
    if reachable and ratio(100 * start) > share:
        assert ratio(weight) == pytest.approx(share, rel=1e-2)


@pytest.mark.parametrize("ratio", [0.0, math.nan, math.inf])
def test_a_ratio_that_says_nothing_moves_nothing(ratio: float) -> None:
    assert held_weight(3.0, ratio, 0.5, 2.0) == 3.0
