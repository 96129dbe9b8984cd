"""Losses at the head and the gradient watch, against full logits and separate backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from kvds.align import build_aligner
from kvds.data.labels import LabelledPositions
from kvds.distillation.gradient_watch import GradientWatch
from kvds.distillation.losses import head_chunk_count, head_losses
from kvds.kv import KVCapture, KVShape, KVStates, select_tokens
from kvds.kv.families import backbone
from tests.harness.kv_settings import both_parts

VOCAB, PADDED = 37, 40


def make_model(layers: int = 2, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=PADDED, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, **kwargs,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def text() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels of three rows; 11 positions have a label."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (3, 9), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, 6:] = 0
    labels = torch.where(attention.bool(), ids, -100)
    labels[:, :4] = -100
    labels[2, 5] = -100
    labels[2, 0] = ids[2, 0]  # the first token of a row is predicted by nothing
    return ids, attention, labels


def test_labelled_positions_are_those_before_a_label() -> None:
    _, _, labels = text()
    found = LabelledPositions.from_labels(labels)
    expected = [(b * 9 + t, int(labels[b, t + 1])) for b in range(3) for t in range(8) if labels[b, t + 1] != -100]
    assert list(zip(found.index.tolist(), found.target.tolist(), strict=True)) == expected
    assert len(expected) == 11


@pytest.mark.parametrize("num_chunks", [1, 3, 7, 20])
def test_cross_entropy_equals_transformers(num_chunks: int) -> None:
    model = make_model()
    ids, attention, labels = text()
    expected = model(input_ids=ids, attention_mask=attention, labels=labels).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    labelled = LabelledPositions.from_labels(labels)
    hidden = backbone(model)(input_ids=ids, attention_mask=attention).last_hidden_state
    task, kd = head_losses(model.get_output_embeddings(), hidden, labelled, num_chunks=num_chunks)
    loss = task / len(labelled.index)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert float(kd) == 0
    loss.backward()
    for name, parameter in model.named_parameters():
        largest = float(gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=2e-6 * largest, msg=name)


def full_logits_kd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, vocab: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if labels[b, t + 1] == -100:
                continue
            p = torch.softmax(teacher[b, t, :vocab].double() / temperature, 0)
            q = torch.softmax(student[b, t, :vocab].double() / temperature, 0)
            total = total + (p * (p / q).log()).sum() * temperature**2
    return total


@pytest.mark.parametrize("num_chunks", [1, 3, 7])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_equals_full_logits(temperature: float, num_chunks: int) -> None:
    student, teacher = make_model(), make_model(seed=1)
    ids, attention, labels = text()
    hidden = backbone(student)(input_ids=ids, attention_mask=attention).last_hidden_state.detach().requires_grad_()
    with torch.no_grad():
        teacher_hidden = backbone(teacher)(input_ids=ids, attention_mask=attention).last_hidden_state
        teacher_logits = teacher.lm_head(teacher_hidden)
    expected = full_logits_kd(student.lm_head(hidden), teacher_logits, labels, temperature, VOCAB)
    expected_gradients = torch.autograd.grad(expected, [hidden, student.lm_head.weight])

    _, kd = head_losses(
        student.lm_head, hidden, LabelledPositions.from_labels(labels), num_chunks=num_chunks,
        teacher_head=teacher.lm_head, teacher_hidden=teacher_hidden, temperature=temperature, vocab_size=VOCAB,
    )  # fmt: skip
    torch.testing.assert_close(kd.double(), expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(kd, [hidden, student.lm_head.weight])
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert teacher.lm_head.weight.grad is None


def test_distillation_of_a_model_from_itself_is_zero() -> None:
    model = make_model()
    ids, _, labels = text()
    hidden = backbone(model)(input_ids=ids).last_hidden_state
    _, kd = head_losses(
        model.lm_head,
        hidden,
        LabelledPositions.from_labels(labels),
        num_chunks=2,
        teacher_head=model.lm_head,
        teacher_hidden=hidden.detach(),
    )
    assert abs(float(kd.detach())) < 1e-5


def test_padded_vocabulary_rows_do_not_count() -> None:
    student, teacher = make_model(), make_model(seed=1)
    ids, _, labels = text()
    values = []
    for shift in (0.0, 50.0):
        with torch.no_grad():
            hidden, other = (backbone(m)(input_ids=ids).last_hidden_state for m in (student, teacher))
            student.lm_head.weight[VOCAB:] += shift
            teacher.lm_head.weight[VOCAB:] -= shift
        found = [
            head_losses(
                student.lm_head, hidden, LabelledPositions.from_labels(labels), num_chunks=2,
                teacher_head=teacher.lm_head, teacher_hidden=other, vocab_size=size,
            )[1]
            for size in (VOCAB, None)
        ]  # fmt: skip
        values.append([value.detach() for value in found])
    assert float(values[0][0]) == float(values[1][0]) > 0
    assert abs(float(values[0][1]) - float(values[1][1])) > 1


@pytest.mark.parametrize("distilled", [False, True])
def test_the_head_is_called_equally_often_also_without_labels(distilled: bool) -> None:
    calls = []
    head = nn.Linear(4, 5)
    head.register_forward_hook(lambda *_: calls.append(1))
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    nothing = LabelledPositions.from_labels(torch.full((2, 3), -100))
    teacher = {"teacher_head": nn.Linear(4, 5), "teacher_hidden": torch.randn(2, 3, 4)} if distilled else {}
    task, _ = head_losses(head, hidden, nothing, num_chunks=3, **teacher)
    assert float(task.detach()) == 0 and len(calls) == (3 if distilled else 1)
    task.backward()
    assert hidden.grad is not None and float(hidden.grad.abs().sum()) == 0
    assert head.weight.grad is not None and float(head.weight.grad.abs().sum()) == 0


def test_chunk_count_bounds_a_chunk() -> None:
    for tokens, vocab in ((1, 10), (4096, 151_936), (8192, 50_257)):
        chunks = head_chunk_count(tokens, vocab)
        assert -(-tokens // chunks) * vocab <= 2**26 + vocab
        assert chunks == 1 or -(-tokens // (chunks - 1)) * vocab > 2**26 - vocab


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_gradient_watch_equals_separate_backward_passes(rope: str, layers: int) -> None:
    model = make_model(layers)
    ids, attention, labels = text()
    labelled = LabelledPositions.from_labels(labels)
    shape = KVShape.from_config(model.config)
    aligner = build_aligner(shape, shape, both_parts(layer_map="endpoint", impl="reference"))
    selection = select_tokens("full", None, attention, attention)
    generator = torch.Generator().manual_seed(2)
    states = [tuple(torch.randn(3, 2, 9, 4, generator=generator) for _ in range(layers)) for _ in range(2)]
    teacher = KVStates(*states)
    weight = 3.0

    def forward() -> tuple[KVCapture, Tensor, Tensor]:
        with KVCapture(model, rope=rope, require_grad=True) as capture:
            hidden = backbone(model)(input_ids=ids, attention_mask=attention).last_hidden_state
        task, _ = head_losses(model.lm_head, hidden, labelled, num_chunks=1)
        return capture, task, weight * aligner(capture.states, teacher, selection).loss

    capture, task, kv = forward()
    watch = GradientWatch()
    watch.attach(capture)
    assert watch.ratio() is None
    (task + kv).backward()
    found = watch.ratio()
    assert found is not None

    capture, task, kv = forward()
    captured = [*capture.key_heads, *capture.states.values]
    outputs = [output for output, _ in (*capture.key_outputs, *capture.value_outputs)]
    own = torch.autograd.grad(kv, captured, retain_graph=True)
    # The aligner's own share: what reaches a layer through later layers' keys belongs to the rest of the network.
    leaves = [tensor.detach().requires_grad_() for tensor in (*capture.states.keys, *capture.states.values)]
    direct_loss = weight * aligner(KVStates(tuple(leaves[:layers]), tuple(leaves[layers:])), teacher, selection).loss
    direct = torch.autograd.grad(direct_loss, leaves)
    if layers == 1:
        for one, other in zip(own, direct, strict=True):
            torch.testing.assert_close(one.norm(), other.norm(), rtol=1e-5, atol=0)
    through_network = [g.norm().square() for g in torch.autograd.grad(task, outputs, retain_graph=True)]
    kv_norm = torch.stack([g.norm().square() for g in direct]).sum().sqrt()
    if layers == 1:
        rest_norm = torch.stack(through_network).sum().sqrt()
    else:
        total = torch.autograd.grad(task + kv, outputs, retain_graph=True)
        if rope == "post":  # a rotation keeps norms, so its own share is taken where it arrives
            direct = torch.autograd.grad([*capture.states.keys, *capture.states.values], captured, direct)
        flat = [g.transpose(1, 2).flatten(2) for g in direct]
        rest_norm = torch.stack([(t - d).norm().square() for t, d in zip(total, flat, strict=True)]).sum().sqrt()
    torch.testing.assert_close(found, kv_norm / rest_norm, rtol=1e-4, atol=0)


@pytest.mark.parametrize("distilled", [False, True])
def test_scale_multiplies_both_sums_once(distilled: bool) -> None:
    head, hidden = nn.Linear(4, 5), torch.randn(2, 3, 4, requires_grad=True)
    labelled = LabelledPositions.from_labels(torch.randint(0, 5, (2, 3)))
    teacher = {"teacher_head": nn.Linear(4, 5), "teacher_hidden": torch.randn(2, 3, 4)} if distilled else {}
    plain, scaled = (head_losses(head, hidden, labelled, num_chunks=2, scale=s, **teacher) for s in (1.0, 0.25))
    assert [float(x) for x in scaled] == pytest.approx([0.25 * float(x) for x in plain], rel=1e-6)
    assert float(plain[0]) > 0 and (float(plain[1]) > 0) == distilled
