"""A map that follows a student in training starts as fitted, keeps up with it, and collapses only with it together."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from kvds.data.batches import collate
from kvds.data.encoding import EncodedSample
from kvds.data.example import Example
from kvds.data.labels import LabelledPositions
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.errors import InputError
from kvds.evaluation.handoff import evaluate_handoff
from kvds.handoff.cache_map import CacheMap, source_layers
from kvds.handoff.continuation import Continuation, continue_from, first_prompt_length
from kvds.handoff.fitting import fit_map
from kvds.handoff.following_map import FollowingMap
from kvds.handoff.moments import MapMoments
from kvds.handoff.reading import read_states
from kvds.kv import KVShape, KVStates
from kvds.kv.families import backbone
from kvds.kv.states import KV_PARTS
from kvds.teacher.teacher import TeacherOutput
from tests.handoff.pairs import model_of, rows_of

CPU = torch.device("cpu")
SHAPE = KVShape(2, 2, 4, 2)


def random_states(shape, batch, tokens, generator, offset=0.0):
    size = (batch, shape.num_key_value_heads, tokens, shape.head_dim)
    return KVStates(
        *(tuple(offset + torch.randn(size, generator=generator) for _ in range(shape.num_hidden_layers)) for _ in "kv")
    )


def started(teacher_shape, student_shape, teacher, student, mask):
    sources = source_layers(student_shape.num_hidden_layers, teacher_shape.num_hidden_layers)
    fitted, follower = (
        CacheMap(teacher_shape, student_shape, sources),
        FollowingMap(teacher_shape, student_shape, sources),
    )
    moments = MapMoments(fitted, CPU)
    moments.update(teacher, student, mask, torch.arange(len(mask)) % 2)
    fit_map(fitted, moments)
    follower.start(fitted, moments)
    return fitted, follower


def test_it_starts_as_the_fitted_map_and_is_saved_as_one():
    generator = torch.Generator().manual_seed(0)
    teacher_shape, student_shape = KVShape(3, 3, 4, 3), KVShape(2, 1, 6, 1)
    teacher = random_states(teacher_shape, 6, 9, generator, offset=3.0)
    student = random_states(student_shape, 6, 9, generator, offset=-5.0)
    mask = torch.rand(6, 9, generator=generator) < 0.8
    fitted, follower = started(teacher_shape, student_shape, teacher, student, mask)
    made, expected = follower(teacher, student, mask, 0.5), fitted(teacher)
    for part in KV_PARTS:
        for found, wanted in zip(getattr(made.states, part), getattr(expected, part), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            assert not found.requires_grad
        torch.testing.assert_close(follower.as_cache_map().weight(part), fitted.weight(part), rtol=1e-4, atol=1e-5)
    terms = []
    for part in KV_PARTS:
        for layer, (found, own) in enumerate(zip(getattr(expected, part), getattr(student, part), strict=True)):
            unit = getattr(follower, f"{part}_target_unit")[layer]
            terms.append((((found - own) / unit).square().mean((1, 3)) * mask).sum())
    torch.testing.assert_close(made.loss, 0.5 * torch.stack(terms).mean(), rtol=1e-4, atol=0)


def norm(states):
    return float(torch.stack([layer.detach().square().mean().sqrt() for part in states for layer in part]).mean())


@pytest.mark.parametrize("joint", [True, False])
def test_trained_together_student_and_map_collapse_and_a_detached_student_does_not(joint):
    """The prettiest of losses, for which the student shrinks to what the map makes of chance. Detached, it stays."""
    generator = torch.Generator().manual_seed(0)
    everything = torch.ones(8, 24, dtype=torch.bool)
    teacher = random_states(SHAPE, 8, 24, generator)
    student = random_states(SHAPE, 8, 24, generator)
    _, follower = started(SHAPE, SHAPE, teacher, student, everything)
    leaves = [layer.requires_grad_() for part in student for layer in part]
    start = norm(student)
    optimizer = torch.optim.Adam([*follower.parameters(), *leaves], lr=3e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = follower(teacher, student if joint else student.detach(), everything).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if joint:
        assert losses[-1] < 1e-3 * losses[0] and norm(student) < 0.5 * start, (losses[-1] / losses[0], norm(student))
    else:
        assert norm(student) == start and losses[-1] < 1.05 * losses[0]


@pytest.fixture(scope="module")
def trained():
    """Teacher, student, map, and a step input of four rows, one of them padding."""
    teacher = model_of("qwen2", seed=1, layers=3).float()
    student = model_of("llama", seed=2, layers=2, heads=2, groups=1, dim=6).float().train()
    rows = rows_of([(6, 3, 2), (2, 2, 2), (3, 0, 2)])
    batch = collate([*rows, None], [0, 1, 2, -1], 0, 4.0, 1.0)
    mask = batch.attention_mask.bool()
    shapes = KVShape.from_config(teacher.config), KVShape.from_config(student.config)
    states = read_states(teacher, batch.input_ids, mask)
    _, follower = started(*shapes, states, read_states(student, batch.input_ids, mask), mask)
    step = StepInput(
        batch, LabelledPositions.from_labels(batch.labels), None, TeacherOutput(states, None), None,
        LossWeights(task=0.5, handoff=0.7), continuation=Continuation.from_batch(batch),
    )  # fmt: skip
    return student, follower, step


def gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(module.named_parameters(), found, strict=True)
    }


def test_the_module_adds_the_cross_entropy_through_the_cache_and_the_maps_own_loss(trained):
    """The student's gradient is that of task and answers alone, the map's that of its own loss alone."""
    student, follower, step = trained
    module = DistillationModule(student, following_map=follower)
    loss, metrics = module(step)
    row = step.continuation
    own = row.prompt_states(read_states(student, step.batch.input_ids, step.batch.attention_mask.bool()))
    made = follower(row.prompt_states(step.teacher.states), own, row.prompt_mask, 1 / 4.0)
    logits = student(input_ids=step.batch.input_ids, attention_mask=step.batch.attention_mask).logits.flatten(0, 1)
    task = nn.functional.cross_entropy(logits[step.labelled.index], step.labelled.target, reduction="sum") / 4
    hidden = continue_from(student, made.states, row, step.batch.input_ids).flatten(0, 1)
    answers = nn.functional.cross_entropy(
        student.lm_head(hidden[row.labelled.index]), row.labelled.target, reduction="sum"
    )
    assert float(metrics["loss/handoff"]) == pytest.approx(float(answers.detach()) / 4, rel=1e-4)
    assert float(metrics["loss/handoff_map"]) == pytest.approx(float(made.loss.detach()), rel=1e-4)
    expected = 0.5 * task + 0.7 * answers / 4
    assert float(loss.detach()) == pytest.approx(float((expected + made.loss).detach()), rel=1e-4)
    found, wanted = gradients(student, loss), gradients(student, expected)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    found, wanted = gradients(follower, loss), gradients(follower, made.loss)
    assert max(float(g.abs().max()) for g in wanted.values()) > 0
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_extra_forward_is_of_the_answer_tokens_alone(trained):
    """And with a weight of 0 there is none."""
    student, follower, step = trained
    module, widths = DistillationModule(student, following_map=follower), []
    hook = backbone(student).register_forward_pre_hook(
        lambda _m, _a, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        module(step)
        module(replace(step, weights=LossWeights()))
    finally:
        hook.remove()
    assert widths == [11, 6, 11]  # rows of 11, 6 and 5 tokens, of which 6, 5 and 3 come with or after a prompt's last


def test_of_a_conversation_the_cache_holds_the_first_turn():
    batch = collate(rows_of([(2, 2, 3)]), [0], 0, 1.0, 1.0)
    prompt, answer = 1, 3
    segments = torch.tensor([[prompt, prompt, answer, answer, prompt, answer, answer, 0]])
    labels = torch.tensor([[-100, -100, 12, 13, -100, 16, 17, -100]])
    ids = torch.arange(10, 18)[None]
    batch = replace(batch, input_ids=ids, segment_ids=segments, labels=labels, attention_mask=(segments != 0).long())
    row = Continuation.from_batch(batch)
    assert row.prompt_index.tolist() == [[0]] and row.index[row.mask].tolist() == [1, 2, 3, 4, 5, 6]
    assert row.labelled.target.tolist() == [12, 13, 16, 17]  # all that the normalizer of a step counts
    sample = EncodedSample(tuple(range(10, 17)), tuple(segments[0, :7].tolist()), 0)
    assert first_prompt_length(sample) == 2
    example = Example("q", "", "a", corpus="mine", place="rows.jsonl:3")
    with pytest.raises(InputError, match="rows.jsonl:3: a conversation of several turns"):
        evaluate_handoff(None, None, [example], [sample])
