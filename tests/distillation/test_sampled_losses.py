"""Losses of rows that the student wrote: the teacher judges them, the task does not; against whole logits by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvds.data.batches import TokenBatch, collate, collate_packed
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.data.on_policy_rows import with_completion
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.ops.divergences import Divergence
from kvds.teacher.teacher import Teacher
from tests.harness.distillation_setup import CPU, Setup, batch_of, qwen2, samples, setup, step_input

TEMPERATURE = 2.0
WEIGHTS = LossWeights(task=0.7, logit_kd=0.4)


def rows() -> list[EncodedSample]:
    first, second, third, fourth = samples()
    return [with_completion(first, [7, 3, 9, 2]), second, third, with_completion(fourth, [11])]


def models(divergence: Divergence) -> tuple[DistillationModule, Teacher]:
    module = DistillationModule(
        qwen2(1, 2, 16), kd_temperature=TEMPERATURE, kd_divergence=divergence, kd_vocab_size=47, head_chunks=2
    )
    return module, Teacher(qwen2(2, 3, 24), device=CPU, wants_states=False, wants_hidden=True)


def counted(row: EncodedSample) -> list[int]:
    """Positions whose next token is rationale or answer."""
    return [i - 1 for i, segment in enumerate(row.segment_ids) if i and segment > 1]


def by_hand(module: DistillationModule, teacher: Teacher, kind: str) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the data's rows and mean divergence of all, row by row from whole logits."""
    task, kd, task_tokens, all_tokens = torch.zeros(()), torch.zeros(()), 0, 0
    for row in rows():
        ids = torch.tensor([row.input_ids])
        own, other = module.student(input_ids=ids).logits[0], teacher._forward.model(input_ids=ids).logits[0]  # type: ignore[union-attr]
        for place in counted(row):
            if not row.sampled:
                task, task_tokens = task - own[place].log_softmax(-1)[row.input_ids[place + 1]], task_tokens + 1
            q, p = ((x[place, :47] / TEMPERATURE).softmax(-1) for x in (own, other.detach()))
            first, second = (p, q) if kind == "forward_kl" else (q, p)
            kd, all_tokens = kd + TEMPERATURE**2 * (first * (first / second).log()).sum(), all_tokens + 1
    return task / task_tokens, kd / all_tokens


def batch(form: str) -> TokenBatch:
    some = rows()
    labels, own = (float(sum(getattr(row, name) for row in some)) for name in ("label_count", "taught_count"))
    places = [row.example for row in some]
    if form == "padded":
        return collate(some, places, 0, labels, 1.0, taught_normalizer=own)
    return collate_packed(some, places, 0, labels, 1.0, capacity=80, one_row=True, taught_normalizer=own)


def given(batch: TokenBatch, teacher: Teacher, weights: LossWeights = WEIGHTS) -> StepInput:
    assert batch.sampled_labels is not None
    labelled, sampled = (LabelledPositions.from_labels(one) for one in (batch.labels, batch.sampled_labels))
    return StepInput(batch, labelled, None, teacher(batch), teacher.head, weights, sampled=sampled)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("form", ["padded", "one row"])
def test_losses_and_gradients_are_those_by_hand(form: str, kind: str) -> None:
    module, teacher = models(Divergence(kind))
    if form == "one row":
        module.student.set_attn_implementation("kvds_rows")
        teacher._forward.model.set_attn_implementation("kvds_rows")  # type: ignore[union-attr]
    loss, metrics = module(given(batch(form), teacher))
    loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    module.student.set_attn_implementation("sdpa")
    teacher._forward.model.set_attn_implementation("sdpa")  # type: ignore[union-attr]
    task, kd = by_hand(module, teacher, kind)
    (WEIGHTS.task * task + WEIGHTS.logit_kd * kd).backward()
    torch.testing.assert_close(metrics["loss/task"], task.detach())
    torch.testing.assert_close(metrics["loss/logit_kd"], kd.detach())
    torch.testing.assert_close(loss.detach(), (WEIGHTS.task * task + WEIGHTS.logit_kd * kd).detach())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_of_completions_alone_tells_no_task_loss() -> None:
    module, teacher = models(Divergence())
    own = [row for row in rows() if row.sampled]
    alone = collate(own, [0, 1], 0, 0.0, 1.0, taught_normalizer=float(sum(row.taught_count for row in own)))
    loss, metrics = module(given(alone, teacher))
    assert "loss/task" not in metrics
    torch.testing.assert_close(loss.detach(), WEIGHTS.logit_kd * metrics["loss/logit_kd"])
    bare, told = module(given(alone, teacher, LossWeights(task=1.0)))
    assert bare.item() == 0 and "loss/logit_kd" not in told
    bare.backward()  # ranks reduce the same gradients whatever their rows


@pytest.fixture(scope="module")
def aligned() -> Setup:
    return setup("qwen2", alignment_mode="structured")


def test_keys_and_values_of_a_completion_count_as_of_any_row(aligned: Setup) -> None:
    some = rows()
    labels, own = (float(sum(getattr(row, name) for row in some)) for name in ("label_count", "taught_count"))
    written = collate(some, [row.example for row in some], 0, labels, 30.0, taught_normalizer=own)
    assert written.sampled_labels is not None
    sampled = LabelledPositions.from_labels(written.sampled_labels)
    weights = LossWeights(task=1.0, kv=1.5)
    found = aligned.module(replace(step_input(written, aligned.teacher, weights), sampled=sampled))[1]
    as_data = batch_of([replace(row, sampled=False) for row in some], (1.0, 30.0))
    expected = aligned.module(step_input(as_data, aligned.teacher, weights))[1]
    for name in ("loss/kv", "loss/kv_keys", "loss/kv_values"):
        assert found[name] == expected[name] > 0
