"""Cross entropy whose gradients are made in the forward pass, against autograd on the full logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kvds.data.labels import LabelledPositions
from kvds.distillation.head_loss import losses_at_head
from kvds.distillation.losses import head_losses
from kvds.plan.live_memory import LiveMemory, drop_gradients


def problem(dtype: torch.dtype, count: int = 13, bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    head = nn.Linear(6, 17, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    rows = torch.randn(count, 6, generator=generator).to(dtype).requires_grad_()
    return head.to(dtype), rows, torch.randint(0, 17, (count,), generator=generator)


def gradients(loss: Tensor, head: nn.Linear, rows: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [rows, *head.parameters()]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunks", [1, 3, 13, 20])
def test_loss_and_gradients_are_autograds(chunks: int, bias: bool) -> None:
    head, rows, target = problem(torch.float64, bias=bias)
    expected = 0.7 * F.cross_entropy(head(rows), target, reduction="sum")
    found = losses_at_head(head, rows, target, num_chunks=chunks, scale=0.7).loss
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    for a, b in zip(gradients(2.5 * found, head, rows), gradients(2.5 * expected, head, rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_bf16_is_no_further_off_than_autograd_in_bf16() -> None:
    head, rows, target = problem(torch.bfloat16, count=400)
    exact_head, exact_rows = nn.Linear(6, 17).double(), rows.detach().double().requires_grad_()
    exact_head.load_state_dict({name: p.double() for name, p in head.state_dict().items()})
    exact = 0.3 * F.cross_entropy(exact_head(exact_rows), target, reduction="sum")
    wanted = gradients(exact, exact_head, exact_rows)
    eager = 0.3 * F.cross_entropy(head(rows).float(), target, reduction="sum")
    found = losses_at_head(head, rows, target, num_chunks=1, scale=0.3).loss
    assert found.dtype == torch.float32

    def errors(loss: Tensor) -> list[float]:
        return [
            float((g.double() - w).norm() / w.norm()) for g, w in zip(gradients(loss, head, rows), wanted, strict=True)
        ]

    assert abs(float(found) - float(exact)) <= 1.1 * abs(float(eager) - float(exact)) + 1e-6 * float(exact)
    assert all(a <= 1.1 * b for a, b in zip(errors(found), errors(eager), strict=True))


def test_no_tensor_of_all_logits_exists_and_each_chunk_is_made_once() -> None:
    head, rows, target = problem(torch.float32, count=40)
    products: list[tuple[int, ...]] = []
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[-1:] == (17,):
                largest = max(largest, out.numel())
                if "mm" in str(func):
                    products.append(tuple(out.shape))
            return out

    with Watch():
        losses_at_head(head, rows, target, num_chunks=4).loss.backward()
    assert largest == 10 * 17 and products == [(10, 17)] * 4


def test_a_factor_that_comes_with_the_backward_pass_is_not_rounded_itself() -> None:
    head, rows, target = problem(torch.bfloat16, count=40)
    plain, third = (
        gradients(factor * losses_at_head(head, rows, target, num_chunks=2).loss, head, rows) for factor in (1.0, 1 / 3)
    )
    for a, b in zip(third, plain, strict=True):
        assert torch.equal(a, (b.float() / 3).to(a.dtype))  # bf16(1/3) is off by 0.1 %


@pytest.mark.parametrize("frozen", ["rows", "weight"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    head, rows, target = problem(torch.float64, bias=False)
    (rows if frozen == "rows" else head.weight).requires_grad_(False)
    losses_at_head(head, rows, target, num_chunks=2).loss.backward()
    assert (rows.grad is None) == (frozen == "rows") and (head.weight.grad is None) == (frozen == "weight")


def test_two_backward_passes_add_up_and_the_heads_own_forward_comes_back() -> None:
    head, rows, target = problem(torch.float64)
    calls: list[int] = []
    head.register_forward_hook(lambda *_: calls.append(1))
    loss = losses_at_head(head, rows, target, num_chunks=3).loss
    assert len(calls) == 1  # one call, so that ZeRO-3 gathers the weight once
    loss.backward(retain_graph=True)
    once = head.weight.grad.clone()  # type: ignore[union-attr]
    loss.backward()
    assert torch.equal(head.weight.grad, 2 * once)  # type: ignore[arg-type]
    assert head(rows).shape == (13, 17) and "forward" not in vars(head)


def test_head_losses_take_this_way_and_agree_with_the_other() -> None:
    head, rows, _ = problem(torch.float64, count=12)
    labels = torch.randint(0, 17, (3, 4), generator=torch.Generator().manual_seed(4))
    labelled = LabelledPositions.from_labels(labels)
    hidden = rows.view(3, 4, 6)
    direct = head_losses(head, hidden, labelled, num_chunks=2).loss
    recomputed = head_losses(lambda x: head(x), hidden, labelled, num_chunks=2).loss
    torch.testing.assert_close(direct, recomputed.to(direct.dtype), rtol=1e-6, atol=0)
    for a, b in zip(gradients(direct, head, rows), gradients(recomputed, head, rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("distilled", [False, True])
def test_large_chunks_take_no_more_memory_than_small_ones_made_twice(distilled: bool) -> None:
    """Qwen2's heads in bf16 on 32 rows of GSM8K, which 38 chunks of 2^26 logits would hold if every token counted."""
    vocab, count = 151_936, 2807

    def peak(direct: bool) -> int:
        with FakeTensorMode(allow_non_fake_inputs=True):
            head, other = (nn.Linear(size, vocab, bias=False, dtype=torch.bfloat16) for size in (896, 1536))
            hidden, taught = (torch.empty(1, count, size, dtype=torch.bfloat16) for size in (896, 1536))
            hidden.requires_grad_()
            labelled = LabelledPositions(torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64))
            memory = LiveMemory("cuda")
            memory.ignore(iter([head.weight, other.weight, hidden, taught, labelled.index, labelled.target]))
            drop_gradients(head.parameters())
            with memory:
                head_losses(
                    head if direct else lambda rows: head(rows), hidden, labelled, num_chunks=None if direct else 38,
                    teacher_head=other if distilled else None, teacher_hidden=taught if distilled else None,
                ).loss.backward()  # fmt: skip
        return memory.peak

    assert peak(True) <= peak(False)
