"""The module that is trained: one forward of the student, losses that padding, order and splitting do not change."""

from __future__ import annotations

import copy
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from kvds.align import aligner_config_dict, aligner_from_config_dict, build_aligner
from kvds.align.fitting import AlignmentMoments
from kvds.data.batches import TokenBatch
from kvds.data.encoding import EncodedSample, encode_examples
from kvds.data.synthetic import synthetic_examples
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights
from kvds.kv import KVCapture, KVShape, KVStates, select_tokens
from kvds.kv.families import backbone
from kvds.teacher.teacher import Teacher
from tests.harness.distillation_setup import (
    CPU,
    SELECTION,
    batch_of,
    counts,
    padded,
    qwen2,
    results,
    same,
    samples,
    setup,
    step_input,
)
from tests.harness.kv_settings import both_parts

ALL = LossWeights(task=0.7, kv=1.5, logit_kd=0.4)
BUDGETS = [
    {"method": "full", "budget": None},
    {"method": "right_crop", "budget": 3},
    {"method": "right_crop", "budget": 0.4},
]
CASES = [
    ("qwen2", "pre", "flat"),
    ("qwen2", "post", "structured"),
    ("gpt2", "pre", "structured"),
    ("gpt2", "pre", "hidden"),
    ("qwen2", "post", "relation"),
    ("qwen2", "pre", "structural_kv"),
]


@pytest.mark.parametrize("how", BUDGETS, ids=["full", "count", "fraction"])
@pytest.mark.parametrize(("family", "rope", "mode"), CASES)
def test_padding_order_and_splitting_change_nothing(family: str, rope: str, mode: str, how: dict[str, Any]) -> None:
    made = setup(family, rope, alignment_mode=mode)
    rows = samples()
    whole = counts(rows, how)
    batch = batch_of(list(rows), whole)

    def run(*batches: TokenBatch) -> tuple[float, dict[str, Tensor]]:
        return results(made.module, [step_input(b, made.teacher, ALL, how=how) for b in batches])

    expected = run(batch)
    assert expected[0] > 0 and any(float(g.abs().max()) > 0 for n, g in expected[1].items() if "aligner" in n)
    assert float(run(batch_of(rows[:3], whole))[0]) != pytest.approx(expected[0], rel=1e-3)
    # Other content under the padding, more of it on the right, other order of the rows.
    other = dataclasses.replace(batch, input_ids=torch.where(batch.attention_mask.bool(), batch.input_ids, 7))
    same(run(other), expected)
    same(run(padded(batch, 5, content=9)), expected)
    same(run(batch_of([rows[i] for i in (2, 0, 3, 1)], whole)), expected)
    # A row of padding, and the same rows as two or four micro-batches; one of those is padding alone.
    same(run(batch_of([*rows, None], whole)), expected)
    half, third = (whole[0] / 2, whole[1] / 2), (whole[0] / 3, whole[1] / 3)
    same(run(batch_of(rows[:1], half), batch_of(rows[1:], half)), expected)
    same(run(batch_of(rows[:2], third), batch_of([None, None], third), batch_of(rows[2:], third)), expected)


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_nan_under_the_teachers_padding_changes_nothing(mode: str) -> None:
    made = setup(alignment_mode=mode)
    step = step_input(batch_of(list(samples()), counts(samples(), SELECTION)), made.teacher, ALL)
    expected = results(made.module, [step])
    assert step.teacher is not None and step.teacher.states is not None and step.selection is not None
    hidden = ~step.selection.mask[:, None, :, None]
    dirty = KVStates(
        *(
            tuple(x.masked_fill(hidden, float("nan")) for x in side)
            for side in (step.teacher.states.keys, step.teacher.states.values)
        )
    )
    same(
        results(made.module, [dataclasses.replace(step, teacher=dataclasses.replace(step.teacher, states=dirty))]),
        expected,
    )


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(kv=1.0), ALL], ids=["task", "kv", "all"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_student_forward_per_step_and_no_teacher_head_unasked(weights: LossWeights, checkpointing: bool) -> None:
    made = setup()
    student = made.module.student
    made.module.train()
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    calls = {"student": 0, "teacher": 0, "student head": 0, "teacher head": 0, "whole": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    backbone(student).register_forward_hook(count("student"))
    student.register_forward_hook(count("whole"))
    backbone(made.teacher_model).register_forward_hook(count("teacher"))
    student.lm_head.register_forward_hook(count("student head"))
    made.teacher_model.lm_head.register_forward_hook(count("teacher head"))
    step = step_input(batch_of(list(samples()), (20.0, 20.0)), made.teacher, weights, watch=True)
    loss, _ = made.module(step)
    chunks = 2  # of the teacher's head; within one call of the student's
    assert calls["student"] == 1 and calls["teacher"] == 1 and calls["whole"] == 0
    assert calls["student head"] == 1
    assert calls["teacher head"] == (chunks if weights.logit_kd else 0)
    loss.backward()
    assert calls["student"] == 1 and calls["teacher"] == 1


def test_parts_add_up_and_equal_their_own_definitions() -> None:
    made = setup(alignment_mode="structured")
    rows = samples()
    normalizers = counts(rows, SELECTION)
    step = step_input(batch_of(list(rows), normalizers), made.teacher, ALL, watch=True)
    loss, metrics = made.module(step)
    assert all(not value.requires_grad for value in metrics.values())
    expected = 0.7 * metrics["loss/task"] + 1.5 * metrics["loss/kv"] + 0.4 * metrics["loss/logit_kd"]
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics["loss/total"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        (metrics["loss/kv_keys"] + metrics["loss/kv_values"]) / 2, metrics["loss/kv"], rtol=1e-5, atol=0
    )
    for part in ("keys", "values"):
        layers = [value for name, value in metrics.items() if name.startswith(f"loss/kv_{part}_layer_")]
        assert len(layers) == 3  # the teacher's
        torch.testing.assert_close(torch.stack(layers).mean(), metrics[f"loss/kv_{part}"], rtol=1e-5, atol=0)
    with torch.no_grad():
        hf = made.module.student(
            input_ids=step.batch.input_ids, attention_mask=step.batch.attention_mask, labels=step.batch.labels
        )
        with KVCapture(made.module.student) as capture:
            backbone(made.module.student)(input_ids=step.batch.input_ids, attention_mask=step.batch.attention_mask)
        assert step.teacher is not None and step.teacher.states is not None
        aligned = made.module.aligner(student=capture.states, teacher=step.teacher.states, selection=step.selection)  # type: ignore[misc]
    torch.testing.assert_close(metrics["loss/task"], hf.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics["loss/kv"], aligned.loss, rtol=1e-5, atol=0)
    # Norms and ranks from the captured tensors, one token at a time.
    for name, side in (("keys", capture.states.keys), ("values", capture.states.values)):
        norms = []
        for layer in side:
            tokens = [
                layer[b, :, t].flatten() for b in range(4) for t in range(layer.shape[2]) if step.selection.mask[b, t]
            ]  # type: ignore[union-attr]
            norms.append(torch.stack([token.square().sum() for token in tokens]).mean().sqrt())
        torch.testing.assert_close(metrics[f"kv/norm_{name}"], torch.stack(norms).mean(), rtol=1e-5, atol=0)
        assert 1 < float(metrics[f"kv/effective_rank_{name}"]) <= 8


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_weight_zero_equals_plain_fine_tuning_to_the_bit(mode: str) -> None:
    made = setup(alignment_mode=mode)
    plain = DistillationModule(copy.deepcopy(made.module.student), None, head_chunks=2)
    batch = batch_of(list(samples()), counts(samples(), SELECTION))
    loss, gradients = results(made.module, [step_input(batch, made.teacher, LossWeights(kv=0.0))])
    alone, expected = results(plain, [step_input(batch, None, LossWeights())])
    assert loss == alone
    student = {name: g for name, g in gradients.items() if name.startswith("student.")}
    assert student.keys() == expected.keys()
    assert all(torch.equal(student[name], expected[name]) for name in expected)
    assert all(float(g.abs().sum()) == 0 for name, g in gradients.items() if name.startswith("aligner."))


@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_teacher_gets_no_gradient_and_is_no_part_of_the_module(mode: str, direction: str) -> None:
    made = setup(alignment_mode=mode, direction=direction)
    before = copy.deepcopy(made.teacher_model.state_dict())
    step = step_input(batch_of(list(samples()), (20.0, 20.0)), made.teacher, ALL, watch=True)
    assert step.teacher is not None and step.teacher.states is not None
    assert not any(x.requires_grad for x in (*step.teacher.states.keys, *step.teacher.states.values))
    optimizer = torch.optim.SGD(made.module.parameters(), lr=0.1)
    start = {name: p.detach().clone() for name, p in made.module.named_parameters()}
    made.module(step)[0].backward()
    optimizer.step()
    moved = {name for name, p in made.module.named_parameters() if not torch.equal(p, start[name])}
    assert any(name.startswith("aligner.") for name in moved) and any("k_proj" in name for name in moved)
    assert all(p.grad is None and not p.requires_grad for p in made.teacher_model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in made.teacher_model.state_dict().items())
    inside = {id(p) for p in made.module.parameters()}
    assert not any(id(p) in inside for p in made.teacher_model.parameters())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    made = setup()
    made.module.train()
    step = step_input(batch_of(list(samples()), (20.0, 20.0)), made.teacher, ALL)
    expected = results(made.module, [step])
    made.module.student.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    same(results(made.module, [step]), expected)


def test_reentrant_checkpointing_raises() -> None:
    made = setup()
    made.module.train()
    made.module.student.gradient_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="carry no graph"):
        made.module(step_input(batch_of(list(samples()), (20.0, 20.0)), made.teacher, ALL))


def test_evaluation_without_gradient_runs() -> None:
    made = setup()
    step = step_input(batch_of(list(samples()), (20.0, 20.0)), made.teacher, ALL, watch=True)
    expected = float(made.module(step)[0].detach())
    with torch.no_grad():
        loss, _ = made.module(step)
    assert float(loss) == pytest.approx(expected, rel=1e-6) and made.module.gradient_watch is None


def test_aligner_without_teacher_raises() -> None:
    made = setup()
    with pytest.raises(RuntimeError, match="needs the teacher's keys and values"):
        made.module(step_input(batch_of(list(samples()), (20.0, 20.0)), None, LossWeights(kv=1.0)))


@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_student_equal_to_its_teacher_has_loss_zero(mode: str, direction: str) -> None:
    teacher_model = qwen2(2, 3, 16)
    student = copy.deepcopy(teacher_model)
    shape = KVShape.from_config(student.config)
    cfg = both_parts(impl="reference", alignment_mode=mode, direction=direction, layer_map="endpoint")
    aligner: Any = build_aligner(shape, shape, cfg)
    with torch.no_grad():
        for part in aligner.parts.values():
            weight = part.weight if mode == "flat" else part.dim_proj
            weight.copy_(torch.eye(weight.shape[-1]).expand_as(weight))
            if mode == "structured":
                part.head_mix.copy_(torch.eye(2))
    module = DistillationModule(student, aligner)
    teacher = Teacher(teacher_model, device=CPU)
    batch = batch_of(list(samples()), counts(samples(), SELECTION))
    step = step_input(batch, teacher, LossWeights(kv=1.0))
    assert float(module(step)[1]["loss/kv"]) < 1e-12
    with torch.no_grad():
        backbone(student).layers[1].self_attn.v_proj.weight.mul_(1.1)  # type: ignore[union-attr, index]
    assert float(module(step)[1]["loss/kv"]) > 1e-6


@pytest.mark.parametrize("layer_map", ["learned", "endpoint", None])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_aligner_survives_its_file(mode: str, share: bool, layer_map: str | None) -> None:
    made = setup(alignment_mode=mode, map_proj_share_dim=share, layer_map=layer_map, kv_loss="l1", kv_parts="v")
    aligner = made.module.aligner
    assert aligner is not None
    file = io.BytesIO()
    torch.save({"config": aligner_config_dict(aligner), "state_dict": aligner.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    step = step_input(batch_of(list(samples()), (20.0, 20.0)), made.teacher, LossWeights(task=0.0, kv=1.0))
    expected = float(made.module(step)[1]["loss/kv"])
    made.module.aligner = aligner_from_config_dict(saved["config"])
    assert float(made.module(step)[1]["loss/kv"]) != expected  # statistics are part of the state
    made.module.aligner.load_state_dict(saved["state_dict"])
    assert float(made.module(step)[1]["loss/kv"]) == expected
    assert aligner_config_dict(made.module.aligner) == aligner_config_dict(aligner)


# The KV loss alone, on the built-in problems.


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[EncodedSample], list[EncodedSample], int]:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_problem_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train = encode_examples(synthetic_examples("train", problems=320, seed=0), tokenizer, 64).samples
    held_out = encode_examples(synthetic_examples("eval", problems=0, seed=0)[:32], tokenizer, 64).samples
    return train, held_out, len(tokenizer)


def distance(student: nn.Module, teacher: Teacher, batch: TokenBatch) -> float:
    """Squared distance of keys and values in units of the teacher's variance; knows nothing of an aligner."""
    with torch.no_grad(), KVCapture(student) as capture:
        backbone(student)(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    states = teacher(batch).states
    assert states is not None
    real = batch.segment_ids != 0
    found = []
    for s, t in zip((*capture.states.keys, *capture.states.values), (*states.keys, *states.values), strict=True):
        rows, wanted = (x.transpose(1, 2)[real].flatten(1) for x in (s, t))
        found.append((rows - wanted).square().mean() / wanted.var(0).mean())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("identity", [True, False], ids=["identity map", "learned map"])
def test_kv_loss_alone_brings_held_out_keys_and_values_closer(problems: Any, identity: bool) -> None:
    train, held_out, vocab = problems
    teacher_model = qwen2(2, 2 if identity else 3, 16, vocab_size=vocab)
    student = qwen2(1, 2, 16, vocab_size=vocab)
    shapes = [KVShape.from_config(model.config) for model in (student, teacher_model)]
    teacher = Teacher(teacher_model, device=CPU)
    cfg = both_parts(impl="reference", **({"layer_map": "endpoint", "aligner_update": "frozen"} if identity else {}))
    aligner: Any = build_aligner(*shapes, cfg)
    module = DistillationModule(student, aligner)

    def loaded(rows: list[EncodedSample]) -> TokenBatch:
        return batch_of(list(rows), counts(rows, SELECTION))

    first = loaded(train[:64])
    moments = AlignmentMoments(aligner)
    with torch.no_grad(), KVCapture(student) as capture:
        backbone(student)(input_ids=first.input_ids, attention_mask=first.attention_mask)
    selection = select_tokens("full", None, first.segment_ids, first.attention_mask)
    moments.update(capture.states, teacher(first).states, selection)  # type: ignore[arg-type]
    moments.apply()
    if identity:
        with torch.no_grad():
            for part in aligner.parts.values():
                scale, unit = part.target_scale[:, None, None], part.source_scale[:, None, None]
                part.head_mix.copy_(torch.eye(2))
                part.dim_proj.copy_((torch.eye(4) * unit / scale)[:, None])
                part.bias.copy_(-part.target_mean / scale)

    judged = loaded(held_out)

    def held_out_loss() -> float:
        with torch.no_grad():
            return float(module(step_input(judged, teacher, LossWeights(task=0.0, kv=1.0)))[1]["loss/kv"])

    before = held_out_loss(), distance(student, teacher, judged) if identity else 0.0
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=5e-3)
    for step in range(100):
        rows = train[step * 8 % 320 :][:8]
        optimizer.zero_grad()
        loss, _ = module(step_input(loaded(rows), teacher, LossWeights(task=0.0, kv=1.0)))
        loss.backward()
        optimizer.step()
    assert student.lm_head.weight.grad is None or float(student.lm_head.weight.grad.abs().sum()) == 0
    assert held_out_loss() < 0.5 * before[0]
    if identity:
        assert distance(student, teacher, judged) < 0.5 * before[1]
