"""The losses at the head and their gradient in place: torch and the interpreted kernel against autograd in fp64."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from kvds.ops import softmax_loss
from kvds.ops.softmax_loss import softmax_losses_
from tests.harness.softmax_problems import Problem, softmax_oracle, softmax_problem
from tests.ops.compile_gate import SHARED_LIMIT

triton = pytest.importorskip("triton")

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1"
    or (triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0"),
    reason="kernels are not interpreted in this session, or the interpreter of Triton 3.6 meets numpy 2.4 or later",
)
either = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=interpreted)])


def check(p: Problem, found: tuple[Tensor, Tensor], gradient: Tensor, tolerance: float) -> None:
    task, kd, expected = softmax_oracle(p)
    for one, same in zip(found, (task, kd), strict=True):
        torch.testing.assert_close(one.double(), same, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_torch_takes_a_few_rows_at_a_time(
    distilled: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax_loss, "_SLICE", 3 * 41)
    p = softmax_problem(8, 41, 37, distilled, dtype=dtype)
    logits, target, teacher, how = p
    gradient = logits.clone()
    check(p, softmax_losses_(gradient, target, teacher_logits=teacher, **how), gradient, tolerance)


@interpreted
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocab", "counted", "temperature"), [(5, 300, 290, 2.0), (2, 37, 37, 1.0), (1, 256, 5, 0.5)]
)
def test_the_kernel_in_several_blocks(
    rows: int, vocab: int, counted: int, temperature: float, distilled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvds.ops.softmax_kernel import softmax_losses_triton

    p = softmax_problem(rows, vocab, counted, distilled, temperature=temperature)
    logits, target, teacher, _ = p
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    wide = torch.full((rows, vocab + 5), 9.0)  # rows of a wider tensor: what lies between them stays
    gradient = wide[:, :vocab].copy_(logits)
    found = softmax_losses_triton(gradient, target, teacher, counted, temperature, 0.3, 0.7, True, block=64)
    check(p, found, gradient, 1e-6)
    assert (wide[:, vocab:] == 9.0).all()


@either
@pytest.mark.parametrize("distilled", [False, True])
def test_no_rows_lose_nothing(impl: str, distilled: bool) -> None:
    logits, target, teacher, how = softmax_problem(0, 41, 37, distilled)
    assert [float(x) for x in softmax_losses_(logits, target, teacher_logits=teacher, impl=impl, **how)] == [0, 0]


@either
@pytest.mark.parametrize("distilled", [False, True])
def test_logits_stay_where_no_gradient_is_asked(impl: str, distilled: bool) -> None:
    logits, target, teacher, how = softmax_problem(3, 41, 37, distilled)
    before = logits.clone()
    found = softmax_losses_(logits, target, teacher_logits=teacher, gradient=False, impl=impl, **how)
    assert torch.equal(logits, before)
    same = softmax_losses_(logits, target, teacher_logits=teacher, impl=impl, **how)
    assert [float(x) for x in found] == [float(x) for x in same] and not torch.equal(logits, before)


@either
@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_shows_in_its_row_alone(impl: str, spoilt: float) -> None:
    logits, target, _, how = softmax_problem(2, 41, 41, False)
    logits[1, 5] = spoilt
    logits[0, 7] = -float("inf")  # an entry of probability 0 is a number
    task, _ = softmax_losses_(logits, target, impl=impl, **how)
    assert not torch.isfinite(task)
    assert torch.isfinite(logits[0]).all() and not torch.isfinite(logits[1]).all()


def test_every_launch_compiles_without_spills_and_loads_16_bytes_at_a_time() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.softmax_gate"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 24 and {row["arch"] for row in rows} == set(SHARED_LIMIT)
    for row in rows:
        assert row["spills"] == 0 and row["shared"] <= SHARED_LIMIT[row["arch"]] and row["wide_loads"] > 0, row
