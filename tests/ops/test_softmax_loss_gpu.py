"""The kernel of the losses at the head on a GPU: rounding beside eager's, memory, determinism, large vocabularies.

python -m pytest tests/ops/test_softmax_loss_gpu.py -m gpu
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

from kvds.distillation.head_loss import TaughtRows, losses_at_head
from kvds.ops import softmax_loss
from kvds.ops.softmax_loss import softmax_losses_
from tests.harness.softmax_problems import softmax_oracle, softmax_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted: run these alone, with -m gpu"
    ),
]
MIB = 2**20


def error(found: Tensor, expected: Tensor) -> float:
    """``‖found − expected‖ / ‖expected‖``."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(("vocab", "counted"), [(151_936, 151_646), (50_257, 50_257), (262_144, 262_000), (37, 30)])
def test_losses_and_gradient_are_no_further_off_than_torchs(
    vocab: int, counted: int, distilled: bool, dtype: torch.dtype
) -> None:
    p = softmax_problem(67, vocab, counted, distilled, dtype=dtype, device="cuda")
    logits, target, teacher, how = p
    task, kd, expected = softmax_oracle(p)
    rounded = {}
    for impl in ("torch", "triton"):
        gradient = logits.clone()
        losses = softmax_losses_(gradient, target, teacher_logits=teacher, impl=impl, **how)
        for found, same in zip(losses, (task, kd), strict=True):
            assert abs(float(found) - float(same)) <= 2e-6 * abs(float(same)) + 1e-9
        rounded[impl] = error(gradient, expected)
    assert rounded["triton"] <= 1.1 * rounded["torch"] + 1e-6


def test_the_same_to_the_bit_twice_and_chosen_by_itself() -> None:
    logits, target, teacher, how = softmax_problem(300, 151_936, 151_646, True, dtype=torch.bfloat16, device="cuda")
    runs = []
    for impl in ("triton", "auto"):
        gradient = logits.clone()
        runs.append((*softmax_losses_(gradient, target, teacher_logits=teacher, impl=impl, **how), gradient))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("distilled", [False, True])
def test_at_the_head_no_more_than_a_chunk_of_logits_lives(distilled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, count = 151_936, 2807
    torch.manual_seed(0)
    head, other = (nn.Linear(width, vocab, bias=False, device="cuda", dtype=torch.bfloat16) for width in (896, 1536))
    rows, taught = (torch.randn(count, width, device="cuda", dtype=torch.bfloat16) for width in (896, 1536))
    rows.requires_grad_()
    target = torch.randint(0, vocab, (count,), device="cuda")
    teacher = TaughtRows(other, taught, 2.0, 151_646, 0.5) if distilled else None

    def run() -> tuple[Tensor, list[Tensor], float]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            head.weight.grad = rows.grad = None
        loss = losses_at_head(head, rows, target, taught=teacher, scale=1 / count).loss
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        loss.backward()
        assert head.weight.grad is not None and rows.grad is not None
        found = [head.weight.grad.clone(), rows.grad.clone()]
        head.weight.grad = rows.grad = None
        return loss.detach(), found, peak / MIB

    loss, gradients, peak = run()
    # 512 MiB of logits at most, the teacher's included; the weight's gradient, and of hidden states and losses little.
    assert peak < 512 + head.weight.numel() * 2 / MIB + 40
    monkeypatch.setattr(softmax_loss, "_has_triton", lambda: False)
    same, expected, _ = run()
    torch.testing.assert_close(loss, same, rtol=1e-5, atol=0)
    assert all(error(a, b.double()) < 5e-3 for a, b in zip(gradients, expected, strict=True))
