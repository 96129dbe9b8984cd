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
from kvds.distillation.losses import head_losses
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
    found = head_losses(model.get_output_embeddings(), hidden, labelled, num_chunks=num_chunks)
    loss = found.loss / len(labelled.index)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert float(found.kd) == 0 and torch.equal(found.task, found.loss)
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
@pytest.mark.parametrize("plain", [True, False])
def test_distillation_equals_full_logits(plain: bool, temperature: float, num_chunks: int) -> None:
    student, teacher = make_model(), make_model(seed=1)
    ids, attention, labels = text()
    hidden = backbone(student)(input_ids=ids, attention_mask=attention).last_hidden_state.detach().requires_grad_()
    with torch.no_grad():
        teacher_hidden = backbone(teacher)(input_ids=ids, attention_mask=attention).last_hidden_state
        teacher_logits = teacher.lm_head(teacher_hidden)
    expected = full_logits_kd(student.lm_head(hidden), teacher_logits, labels, temperature, VOCAB)
    expected_gradients = torch.autograd.grad(expected, [hidden, student.lm_head.weight])

    head = student.lm_head if plain else lambda rows: student.lm_head(rows)
    kd, _, reported = head_losses(
        head, hidden, LabelledPositions.from_labels(labels), num_chunks=num_chunks, task_weight=0.0,
        teacher_head=teacher.lm_head, teacher_hidden=teacher_hidden, temperature=temperature, vocab_size=VOCAB,
    )  # fmt: skip
    assert torch.equal(kd, reported)
    torch.testing.assert_close(kd.double(), expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(kd, [hidden, student.lm_head.weight])
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert teacher.lm_head.weight.grad is None


def test_distillation_of_a_model_from_itself_is_zero() -> None:
    model = make_model()
    ids, _, labels = text()
    hidden = backbone(model)(input_ids=ids).last_hidden_state
    _, _, kd = head_losses(
        model.lm_head,
        hidden,
        LabelledPositions.from_labels(labels),
        num_chunks=2,
        teacher_head=model.lm_head,
        teacher_hidden=hidden.detach(),
    )
    assert abs(float(kd)) < 1e-5


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
            ).kd
            for size in (VOCAB, None)
        ]  # fmt: skip
        values.append([value.detach() for value in found])
    assert float(values[0][0]) == float(values[1][0]) > 0
    assert abs(float(values[0][1]) - float(values[1][1])) > 1


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("distilled", [False, True])
def test_heads_are_called_equally_often_also_without_labels(distilled: bool, plain: bool) -> None:
    calls: dict[str, int] = {"student": 0, "teacher": 0}
    head, other = nn.Linear(4, 5), nn.Linear(4, 5)
    for name, module in (("student", head), ("teacher", other)):
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    nothing = LabelledPositions.from_labels(torch.full((2, 3), -100))
    teacher: dict[str, Any] = {"teacher_head": other, "teacher_hidden": torch.randn(2, 3, 4)} if distilled else {}
    found = head_losses(head if plain else lambda rows: head(rows), hidden, nothing, num_chunks=3, **teacher)
    assert float(found.loss.detach()) == 0 and calls == {"student": 1 if plain else 3, "teacher": 3 * distilled}
    found.loss.backward()
    assert hidden.grad is not None and float(hidden.grad.abs().sum()) == 0
    assert head.weight.grad is not None and float(head.weight.grad.abs().sum()) == 0


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
        task = head_losses(model.lm_head, hidden, labelled, num_chunks=1).loss
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
    assert [float(x.detach()) for x in scaled] == pytest.approx([0.25 * float(x.detach()) for x in plain], rel=1e-6)
    assert float(plain.task) > 0 and (float(plain.kd) > 0) == distilled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [(1.0, 0.5), (0.0, 2.0), (0.3, 0.0), (0.0, 0.0)])
def test_loss_and_gradients_are_those_of_recomputed_chunks(weights: tuple[float, float], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    head, other = nn.Linear(16, PADDED, dtype=dtype), nn.Linear(16, PADDED + 3, bias=False, dtype=dtype)
    hidden, taught = (torch.randn(3, 9, 16, generator=generator, dtype=dtype) * 5 for _ in range(2))
    hidden.requires_grad_()
    labelled = LabelledPositions.from_labels(text()[2])
    keywords: dict[str, Any] = {
        "teacher_head": other, "teacher_hidden": taught, "temperature": 2.0, "vocab_size": VOCAB, "scale": 0.1,
        "task_weight": weights[0], "kd_weight": weights[1],
    }  # fmt: skip
    ways = {"direct": head, "recomputed": lambda rows: head(rows)}
    found = {name: head_losses(way, hidden, labelled, num_chunks=3, **keywords) for name, way in ways.items()}
    for one, same in zip(found["direct"], found["recomputed"], strict=True):
        torch.testing.assert_close(one, same.to(dtype), rtol=1e-6, atol=1e-7)
    gradients = {name: torch.autograd.grad(x.loss, [hidden, *head.parameters()]) for name, x in found.items()}
    for one, same in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-5, atol=1e-6 * float(same.abs().max()))
    assert float(found["direct"].task) > 0 and float(found["direct"].kd) > 0


def test_without_gradients_the_same_losses_in_one_call() -> None:
    head, hidden = nn.Linear(4, 5), torch.randn(2, 3, 4, requires_grad=True)
    labelled = LabelledPositions.from_labels(torch.randint(0, 5, (2, 3)))
    teacher: dict[str, Any] = {"teacher_head": nn.Linear(4, 5), "teacher_hidden": torch.randn(2, 3, 4)}
    trained = head_losses(head, hidden, labelled, **teacher)
    with torch.no_grad():
        evaluated = head_losses(head, hidden, labelled, **teacher)
    assert all(torch.equal(a, b) for a, b in zip(trained, evaluated, strict=True))
    assert trained.loss.requires_grad and not (evaluated.loss.requires_grad or trained.task.requires_grad)
