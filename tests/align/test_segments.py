"""Steps are compared as means over their tokens: against loops, for texts of different lengths on both sides."""

import dataclasses

import pytest
import torch

from kvds.align import build_aligner
from kvds.config import RunConfig
from kvds.data.batches import TokenBatch, collate
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.data.run_data import _check_steps
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.errors import InputError
from kvds.kv import (
    HiddenStates,
    KVShape,
    KVStates,
    Selection,
    common_reasoning_steps,
    open_capture,
    pool_reasoning_steps,
)
from kvds.kv.families import backbone
from kvds.teacher.teacher import Teacher, TeacherOutput
from kvds.training.calibration import calibrate_aligner
from tests.harness.distillation_setup import CPU, qwen2, results
from tests.harness.kv_settings import both_parts


def row(number: int, steps: list[int], teacher: list[int] | None = None) -> EncodedSample:
    """A row with a prompt of 3 tokens, steps of the given lengths and an answer of 2."""
    generator = torch.Generator().manual_seed(10 * number + sum(steps))
    inner = sum(steps)
    ids = torch.randint(1, 50, (3 + inner + 2,), generator=generator).tolist()
    numbers = [n + 1 for n, length in enumerate(steps) for _ in range(length)]
    other = None if teacher is None else row(number, teacher)
    return EncodedSample(tuple(ids), (1,) * 3 + (2,) * inner + (3,) * 2, number, (0, 0, 0, *numbers, 0, 0), other)


ROWS = [row(0, [2, 1, 3], [4, 2, 5, 1]), row(1, [3]), row(2, [1, 1], [6]), row(3, [])]


def batch_of(rows: list[EncodedSample | None]) -> TokenBatch:
    steps = float(sum(r.reasoning_step_count for r in ROWS))
    return collate(rows, [0] * len(rows), 0, 20.0, steps)


@pytest.mark.parametrize("kind", [KVStates, HiddenStates])
def test_pooled_states_are_means_over_the_tokens_of_a_step(kind):
    generator = torch.Generator().manual_seed(0)
    parts = [[torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2)] for _ in
             range(len(kind._fields))]  # fmt: skip
    ids = torch.tensor([[0, 1, 1, 2, 0], [1, 2, 3, 3, 3]])
    dirty = kind(*(tuple(x.masked_fill((ids == 0)[:, None, :, None], float("nan")) for x in part) for part in parts))
    pooled = pool_reasoning_steps(dirty, ids, 4)
    assert type(pooled) is kind
    for part, found in zip(parts, pooled, strict=True):
        for layer, one in zip(part, found, strict=True):
            expected = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
            for b in range(2):
                for s in range(4):
                    tokens = [layer[b, :, t] for t in range(5) if ids[b, t] == s + 1]
                    if tokens:
                        expected[b, :, s] = torch.stack(tokens).mean(0)
            torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-14)
    x = parts[0][0].float().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y: pool_reasoning_steps(KVStates((y,), (y,)), ids, 4).keys[0], x.detach().double().requires_grad_()
    )
    assert pool_reasoning_steps(KVStates((x.bfloat16(),), ()), ids, 4).keys[0].dtype == torch.float32


def test_common_steps_are_those_that_both_texts_have():
    student, teacher = torch.tensor([[0, 1, 2, 3], [1, 1, 1, 0], [0, 0, 0, 0]]), torch.tensor([[1, 2], [1, 2], [1, 0]])
    found = common_reasoning_steps(student, teacher, 4)
    assert found.index is None
    assert found.mask.tolist() == [[True, True, False, False], [True, False, False, False], [False] * 4]


def step_input(batch: TokenBatch, teacher: Teacher, *, watch: bool = False) -> StepInput:
    text = batch.teacher_text or batch
    selection = Selection(None, torch.zeros_like(batch.attention_mask, dtype=torch.bool))
    if batch.reasoning_step_ids is not None and text.reasoning_step_ids is not None:
        selection = common_reasoning_steps(batch.reasoning_step_ids, text.reasoning_step_ids, batch.num_reasoning_steps)
    labelled = LabelledPositions.from_labels(batch.labels)
    return StepInput(batch, labelled, selection, teacher(batch), None, LossWeights(kv=1.5), watch)


@pytest.mark.parametrize("mode", ["flat", "structured", "hidden", "relation"])
def test_texts_of_different_lengths_meet_step_by_step(mode, monkeypatch):
    student, teacher_model = qwen2(1, 2, 16), qwen2(2, 3, 24)
    settings = both_parts(alignment_mode=mode, impl="reference", align_tokens="segment")
    shapes = [KVShape.from_config(model.config) for model in (student, teacher_model)]
    aligner = build_aligner(*shapes, settings)
    teacher = Teacher(teacher_model, device=CPU, reads=aligner.teacher_reads)

    def match(batch: TokenBatch) -> tuple[TeacherOutput, Selection]:
        step = step_input(batch, teacher)
        return step.teacher, step.selection  # type: ignore[return-value]

    batch = batch_of(list(ROWS))
    monkeypatch.setattr("kvds.training.calibration.all_reduce_sum", lambda tensor: None)
    calibrate_aligner(aligner, student, lambda: [batch], match, rope="pre")
    module = DistillationModule(student, aligner)
    loss, metrics = module(step_input(batch, teacher, watch=True))
    assert metrics["loss/kv"] > 0

    # Each row alone, unpadded, on both sides; steps pooled by hand; each step weighs the same.
    def pooled(model, ids: tuple[int, ...], numbers: tuple[int, ...], count: int):
        with torch.no_grad(), open_capture(model, aligner.teacher_reads) as capture:
            backbone(model)(input_ids=torch.tensor([ids]), use_cache=False)
        places = [[t for t, n in enumerate(numbers) if n == step + 1] for step in range(count)]
        return type(capture.states)(
            *(
                tuple(torch.stack([layer[:, :, p].mean(2) for p in places], 2) for layer in part)
                for part in capture.states
            )
        )

    total, steps = torch.zeros(()), 0
    for sample in ROWS:
        count, text = sample.reasoning_step_count, sample.teacher_text or sample
        if count:
            own = pooled(student, sample.input_ids, sample.reasoning_step_ids, count)
            theirs = pooled(teacher_model, text.input_ids, text.reasoning_step_ids, count)
            mask = torch.ones(1, count, dtype=torch.bool)
            total = total + count * aligner(own, theirs, Selection(None, mask)).loss.detach()
            steps += count
    assert steps == 3 + 1 + 1
    torch.testing.assert_close(metrics["loss/kv"], total / steps, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.detach(), metrics["loss/task"] + 1.5 * metrics["loss/kv"], rtol=1e-5, atol=0)

    expected = results(module, [step_input(batch, teacher)])
    halves = [dataclasses.replace(b, label_normalizer=10.0, position_normalizer=steps / 2) for b in
              (batch_of(ROWS[:1]), batch_of(ROWS[1:]))]  # fmt: skip
    found = results(module, [step_input(b, teacher) for b in halves])
    largest = max(float(g.abs().max()) for g in expected[1].values())
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)
    # A micro-batch of padding alone, and of a row without steps, give a loss of zero that can be trained on.
    for rows in ([None], [ROWS[3]]):
        alone = results(module, [step_input(batch_of(rows), teacher)])
        assert all(torch.isfinite(g).all() for g in alone[1].values())
        assert all(not g.any() for name, g in alone[1].items() if name.startswith("aligner"))


def test_rows_that_cannot_serve_are_explained():
    cfg = RunConfig(model_name="gpt2", output_dir="x", align_tokens="segment")
    _check_steps(cfg, ROWS)
    with pytest.raises(InputError, match="align_tokens=segment: no training row has a rationale"):
        _check_steps(cfg, [ROWS[3]])
    mixed = RunConfig(model_name="gpt2", output_dir="x", align_tokens="segment", logit_kd_weight=0.5)
    _check_steps(mixed, [ROWS[1]])
    with pytest.raises(InputError, match="logit_kd_weight=0.5: some rows have a teacher_rationale"):
        _check_steps(mixed, ROWS)
