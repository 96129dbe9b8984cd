"""Attention by bounds on a GPU: flash and memory-efficient kernels against one sample after the other in fp64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kvds.data.batches import collate, collate_packed
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.data.model_inputs import repacked, unpacked
from kvds.distillation.step import LossWeights, StepInput
from kvds.kv import KVShape, select_tokens
from kvds.kv.row_attention import ROW_ATTENTION, bounds_as_mask, row_attention
from kvds.models.compiled_layers import compile_layers
from kvds.teacher.teacher import Teacher
from tests.kv.test_row_attention import model_of, train_module

pytestmark = pytest.mark.gpu

LENGTHS = (130, 1, 64, 257, 17, 300)
LONGEST = 384


def states(heads: int, dim: int, dtype: torch.dtype, seed: int, lengths: Sequence[int] = LENGTHS) -> Tensor:
    """``[1, heads, T, head_dim]``, as a projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, sum(lengths), heads, dim, generator=generator)
    return rows.to(dtype).transpose(1, 2)


def attended(
    inputs: list[Tensor], gradient: Tensor, window: int | None, device: str, lengths: Sequence[int] = LENGTHS
) -> list[Tensor]:
    """Output and the gradients of all inputs."""
    inputs = [tensor.detach().to(device).requires_grad_() for tensor in inputs]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int().to(device)
    mask = bounds_as_mask(ends, ends.device)
    module: Any = None
    output, _ = row_attention(module, *inputs, mask, scaling=0.125, sliding_window=window, max_length_q=LONGEST)
    output.backward(gradient.to(device))
    return [output.detach(), *(tensor.grad for tensor in inputs)]  # type: ignore[list-item]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_agree_with_one_sample_after_the_other(dtype: torch.dtype, dim: int, window: int | None) -> None:
    inputs = [states(heads, dim, dtype, seed) for seed, heads in enumerate((6, 2, 2))]
    gradient = states(6, dim, dtype, 9).transpose(1, 2)
    exact = attended([tensor.double() for tensor in inputs], gradient.double(), window, "cpu")
    own = attended(inputs, gradient, window, "cpu")
    found = attended(inputs, gradient, window, "cuda")
    for ours, plain, expected in zip(found, own, exact, strict=True):
        assert error(ours, expected) < max(1.5 * error(plain, expected), 1e-6)
    wrong = attended(inputs, gradient, 41 if window else 200, "cuda")[0]
    assert error(wrong, exact[0]) > 10 * error(found[0], exact[0])  # a window is seen to the position


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_may_hold_fewer_tokens_than_the_longest_sample(dtype: torch.dtype, window: int | None) -> None:
    """The last micro-batch of a step often does; ``max_length_q`` is the bound of all of them."""
    lengths = (5, 20)
    inputs = [states(heads, 64, dtype, seed, lengths) for seed, heads in enumerate((6, 2, 2))]
    gradient = states(6, 64, dtype, 9, lengths).transpose(1, 2)
    exact = attended([tensor.double() for tensor in inputs], gradient.double(), window, "cpu", lengths)
    own = attended(inputs, gradient, window, "cpu", lengths)
    found = attended(inputs, gradient, window, "cuda", lengths)
    for ours, plain, expected in zip(found, own, exact, strict=True):
        assert error(ours, expected) < max(1.5 * error(plain, expected), 1e-6)


def rows() -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 50, (n,), generator=generator).tolist() for n in (40, 9, 61, 33, 18, 50, 27)]
    return [EncodedSample(tuple(own), (1, 1, *(2,) * (len(own) - 3), 3), i) for i, own in enumerate(ids)]


class Step:
    """A student, a teacher and one step of them on the GPU."""

    def __init__(self, dtype: torch.dtype, *, compiled: bool, window: int | None = None) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        student, teacher = (
            model_of("mistral" if window else "qwen2", n, 16 * n, n, window, ROW_ATTENTION).to(self.device, dtype)
            for n in (2, 3)
        )
        if compiled:
            compile_layers(student)
            compile_layers(teacher)
        shapes = [KVShape.from_config(model.config) for model in (student, teacher)]
        self.module = train_module(student, shapes).to(self.device)
        self.teacher = Teacher(teacher, device=self.device)

    def input(self, batch: Any) -> StepInput:
        labelled = LabelledPositions.from_labels(batch.labels).to(self.device)
        batch = batch.to(self.device)
        own = unpacked(batch)
        selection = repacked(select_tokens("right_crop", 0.5, own.segment_ids, own.attention_mask), batch)
        return StepInput(batch, labelled, selection, self.teacher(batch, selection), None, LossWeights(0.7, 1.5))

    def run(self, batch: Any) -> tuple[list[float], dict[str, Tensor]]:
        self.module.zero_grad(set_to_none=True)
        loss, metrics = self.module(self.input(batch))
        loss.backward()
        losses = [float(metrics[name].detach()) for name in ("loss/task", "loss/kv")]
        return losses, {n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None}


def batches() -> list[Any]:
    given: Any = (rows(), list(range(len(rows()))), 0, 30.0, 40.0)
    single = collate_packed(*given, capacity=512, one_row=True, longest=64, width=lambda n: -(-n // 64) * 64)
    return [collate(*given), single]


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_in_one_row_is_that_of_padded_rows(compiled: bool, window: int | None) -> None:
    padded, single = batches()
    plain, ours = (
        Step(torch.float32, compiled=False, window=window),
        Step(torch.float32, compiled=compiled, window=window),
    )
    expected, found = plain.run(padded), ours.run(single)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_in_bf16_is_as_close_as_a_padded_one(compiled: bool) -> None:
    padded, single = batches()
    exact = Step(torch.float32, compiled=False).run(padded)
    plain, ours = Step(torch.bfloat16, compiled=False).run(padded), Step(torch.bfloat16, compiled=compiled).run(single)
    for found, near, expected in zip(ours[0], plain[0], exact[0], strict=True):
        assert abs(found - expected) < 2 * abs(near - expected) + 5e-3 * expected
    distances = []
    for result in (ours, plain):
        parts = [(result[1][name].double() - gradient.double()).norm() for name, gradient in exact[1].items()]
        distances.append(float(torch.stack(parts).norm()))
    assert distances[0] < 1.3 * distances[1]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_waits_for_nothing(compiled: bool) -> None:
    made = Step(torch.bfloat16, compiled=compiled)
    single = batches()[1]
    made.run(single)
    inputs = made.input(single)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher = made.teacher(inputs.batch, inputs.selection)
        loss, _ = made.module(inputs)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert teacher.states is not None and bool(torch.isfinite(loss))


def test_the_same_gradients_twice_where_torch_is_told_to_be_deterministic() -> None:
    made = Step(torch.bfloat16, compiled=True)
    single = batches()[1]
    made.run(single)
    torch.use_deterministic_algorithms(True)
    try:
        first, again = made.run(single), made.run(copy.deepcopy(single))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first[0] == again[0] and all(torch.equal(first[1][name], again[1][name]) for name in first[1])
