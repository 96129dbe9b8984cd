"""Logits made of hidden states are the model's own, in evaluation, the task loss and logit distillation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from kvds.data.batches import TokenBatch, collate
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.errors import InputError
from kvds.kv.families import FAMILIES, backbone
from kvds.models.own_logits import check_own_logits, is_plain_head, own_logits
from kvds.teacher.teacher import Teacher
from tests.harness.scaled_families import SCALED, small_scaled_config
from tests.kv.test_row_attention import VOCAB, config_of

IDS = torch.tensor([3, 7, 1, 9, 4])


def model_of(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    scaled = family in SCALED
    config = small_scaled_config(family, vocab_size=VOCAB) if scaled else config_of(family, 2, 32, None)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", [*SCALED, *sorted(set(FAMILIES) - set(SCALED))])
def test_they_are_those_of_the_whole_model(family: str) -> None:
    model = model_of(family)
    hidden = backbone(model)(input_ids=IDS[None]).last_hidden_state[0]
    expected = model(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(own_logits(model, hidden[2:4]), expected[2:4])
    torch.testing.assert_close(check_own_logits(model, IDS)(hidden), expected)
    alone = model.get_output_embeddings()(hidden)
    plain = family not in SCALED
    assert is_plain_head(model) == plain
    assert torch.allclose(alone, expected) == plain  # else this test shows nothing


def batch_of_two() -> TokenBatch:
    rows = [EncodedSample(tuple(range(2, 2 + n)), (1,) * 3 + (2,) * (n - 4) + (3,), i) for i, n in enumerate((9, 6))]
    return collate(rows, [0, 1], 0, 6.0, 6.0)


def losses_of(student: Any, teacher: Any, chunks: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    batch = batch_of_two()
    module = DistillationModule(student, head_chunks=chunks)
    runs = Teacher(teacher, device=torch.device("cpu"), wants_states=False, wants_hidden=True)
    labelled, weights = LabelledPositions.from_labels(batch.labels), LossWeights(task=1.0, logit_kd=1.0)
    loss, metrics = module(StepInput(batch, labelled, None, runs(batch), runs.head, weights))
    loss.backward()
    return metrics["loss/task"], metrics["loss/logit_kd"], [p.grad.clone() for p in student.parameters()]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_a_student_and_a_teacher_that_scale_or_cap(family: str, chunks: int) -> None:
    batch, student, teacher = batch_of_two(), model_of(family, 1), model_of(family, 2)
    task, kd, gradients = losses_of(student, teacher, chunks)
    student.zero_grad()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    labelled = LabelledPositions.from_labels(batch.labels)
    logits = student(**inputs).logits.flatten(0, 1)[labelled.index]
    with torch.no_grad():
        others = teacher(**inputs).logits.flatten(0, 1)[labelled.index]
    plain = F.cross_entropy(logits, labelled.target, reduction="sum") / batch.label_normalizer
    divergence = F.kl_div(logits.log_softmax(1), others.log_softmax(1), reduction="sum", log_target=True)
    divergence = divergence / batch.label_normalizer
    (plain + divergence).backward()
    torch.testing.assert_close(task, plain.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kd, divergence.detach(), rtol=1e-4, atol=1e-6)
    for found, parameter in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_the_task_loss_alone(family: str) -> None:
    """Without logit distillation plain heads take another way, on which nothing would be scaled."""
    batch, student = batch_of_two(), model_of(family)
    labelled = LabelledPositions.from_labels(batch.labels)
    _, metrics = DistillationModule(student)(StepInput(batch, labelled, None, None, None, LossWeights()))
    logits = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    plain = F.cross_entropy(logits.flatten(0, 1)[labelled.index], labelled.target, reduction="sum")
    torch.testing.assert_close(metrics["loss/task"], plain.detach() / batch.label_normalizer, rtol=1e-5, atol=1e-6)


def test_a_forward_that_is_no_backbone_and_head_is_refused() -> None:
    model = model_of("llama")
    forward = model.forward

    def adds_something(input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        output = forward(input_ids=input_ids, **kwargs)
        if input_ids is not None:
            output.logits = output.logits + input_ids.unsqueeze(-1)
        return output

    model.forward = adds_something
    with pytest.raises(InputError, match="LlamaForCausalLM: its logits cannot be made of its hidden states: they diff"):
        check_own_logits(model, IDS)
    model.forward = lambda **kwargs: nn.Linear(2, 2)
    with pytest.raises(InputError, match="its forward is not a backbone and a head"):
        is_plain_head(model)
