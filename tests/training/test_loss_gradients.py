"""What one loss sends the student, against gradients that autograd gives one by one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from kvds.distillation.step import LossWeights, StepInput
from kvds.errors import InputError
from kvds.training import loss_gradients
from kvds.training.loss_gradients import balanced_kv_weight, calibrate_kv_weight, kv_agreement
from tests.training.test_calibration_memory import Engine, plain_gradients, run_of  # noqa: F401 (a fixture)

Inputs = list[Callable[[], StepInput]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Inputs]:
    monkeypatch.setattr(loss_gradients, "all_reduce_sum", lambda tensor: None)
    engine, inputs = run_of("llama", checkpointing=False)
    engine.train()
    return engine, inputs


def gradient(engine: Engine, inputs: Inputs, weights: LossWeights) -> torch.Tensor:
    """All of the student's in one row, fp64."""
    engine.eval()
    student = list(engine.module.student.parameters())
    total = sum(engine(replace(make(), weights=weights))[0] for make in inputs)
    found = torch.autograd.grad(total, student, allow_unused=True)
    rows = [torch.zeros_like(p) if g is None else g for g, p in zip(found, student, strict=True)]
    engine.train()
    return torch.cat([row.flatten().double() for row in rows])


def test_the_agreement_is_the_cosine_of_two_gradients_on_other_rows(run: tuple[Engine, Inputs]) -> None:
    engine, inputs = run
    task, kv = gradient(engine, inputs[:1], LossWeights()), gradient(engine, inputs[1:], LossWeights(0.0, 1.0))
    found = kv_agreement(engine, inputs[:1], inputs[1:])  # type: ignore[arg-type]
    assert found == pytest.approx(float(torch.cosine_similarity(task, kv, dim=0)), abs=1e-5)
    same = kv_agreement(engine, inputs, inputs)  # type: ignore[arg-type]
    assert abs(same - found) > 1e-4
    assert all(p.grad is None for p in engine.parameters())


def test_rows_without_keys_and_values_to_match_give_the_task_alone(run: tuple[Engine, Inputs]) -> None:
    engine, inputs = run

    def unmatched(make: Callable[[], StepInput]) -> StepInput:
        return replace(make(), selection=None, teacher=None)

    bare = [partial(unmatched, make) for make in inputs[:1]]
    found = [kv_agreement(engine, rows, inputs[1:]) for rows in (inputs[:1], bare)]  # type: ignore[arg-type]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_a_fitted_map_counts_at_most_as_much_as_its_loss(run: tuple[Engine, Inputs]) -> None:
    engine, inputs = run
    free = calibrate_kv_weight(engine, inputs, 3.0, 0.5)  # type: ignore[arg-type]
    engine.eval()
    metrics = [engine(make())[1] for make in inputs]
    engine.train()
    ratio = float(sum(m["loss/task"] for m in metrics) / sum(m["loss/kv"] for m in metrics))
    bound = calibrate_kv_weight(engine, inputs, 3.0, 0.5, fitted=True)  # type: ignore[arg-type]
    assert bound == pytest.approx(min(free, 3.0 * 0.5 * ratio), rel=1e-5)
    monotone = [calibrate_kv_weight(engine, inputs, share, 0.5, fitted=True) for share in (1.0, 2.0)]  # type: ignore
    assert monotone[1] == pytest.approx(2 * monotone[0], rel=1e-5)
    # A map that gives the mean alone, with a loss of about 1 and next to no gradient: no bound but that of the loss.
    with torch.no_grad():
        for part in engine.module.aligner.parts.values():
            part.dim_proj.mul_(1e-6)
    metrics = [engine.eval()(make())[1] for make in inputs]
    ratio = float(sum(m["loss/task"] for m in metrics) / sum(m["loss/kv"] for m in metrics))
    engine.train()
    assert calibrate_kv_weight(engine, inputs, 1.0, 1.0) > 1000  # type: ignore[arg-type]
    assert calibrate_kv_weight(engine, inputs, 1.0, 1.0, fitted=True) == pytest.approx(ratio, rel=1e-5)  # type: ignore


def test_a_loss_without_a_gradient_weighs_nothing_or_is_refused(run: tuple[Engine, Inputs]) -> None:
    engine, inputs = run
    with torch.no_grad():
        for part in engine.module.aligner.parts.values():
            part.dim_proj.zero_()
    assert calibrate_kv_weight(engine, inputs, 1.0, 1.0, may_be_none=True) == 0.0  # type: ignore[arg-type]
    assert kv_agreement(engine, inputs, inputs) == 0.0  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the KV loss sends the student no gradient"):
        calibrate_kv_weight(engine, inputs, 1.0, 1.0)  # type: ignore[arg-type]


def test_a_balanced_weight_starts_at_its_share_of_the_losses(run: tuple[Engine, Inputs]) -> None:
    engine, inputs = run
    weight = balanced_kv_weight(engine, inputs, 0.5, lambda metrics: 2 * metrics["loss/task"])  # type: ignore[arg-type]
    engine.eval()
    metrics = [engine(make())[1] for make in inputs]
    expected = 0.5 * 2 * sum(m["loss/task"] for m in metrics) / sum(m["loss/kv"] for m in metrics)
    assert weight == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("norms", [(1.0, float("inf")), (float("inf"), 2.0), (float("nan"), 2.0)])
def test_a_gradient_that_is_not_finite_says_nothing(
    norms: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(norms)
    monkeypatch.setattr(loss_gradients, "_norm", lambda *_: next(left))
    monkeypatch.setattr(loss_gradients, "_without_dropout", lambda engine: contextlib.nullcontext())
    assert math.isnan(kv_agreement(None, [], []))  # type: ignore[arg-type]
