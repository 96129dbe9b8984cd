"""A run with ``--handoff_weight`` in a plan, against real modules on real tensors and against counts by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvds.cli import main
from kvds.data.loader import BatchLoader
from kvds.data.run_data import load_run_data
from kvds.distillation.module import DistillationModule
from kvds.handoff.cache_map import CacheMap
from kvds.handoff.fitting import fit_map
from kvds.handoff.following_map import following_map
from kvds.handoff.moments import MapMoments
from kvds.kv import KVShape, KVStates
from kvds.kv.row_attention import ROW_ATTENTION
from kvds.models.architecture import load_config
from kvds.models.tokenizer import load_tokenizer
from kvds.plan.batch_shape import BatchShape, kv_bytes
from kvds.plan.estimate import Machine, RunPlan
from kvds.plan.handoff import map_fitting_bytes
from kvds.plan.live_memory import LiveMemory, drop_gradients
from kvds.plan.phases import CALIBRATED_MAP, CALIBRATED_WEIGHT, TRAINING, Phases
from kvds.plan.step import StepPlanner
from tests.harness.plan_recipe import config

SMALL = "hidden_size=64,intermediate_size=160,num_attention_heads=4,head_dim=16,vocab_size=512,num_hidden_layers={}"
GPU = Machine(1, 1, 80 * 2**30)


@pytest.mark.parametrize("layers", [None, 6])
def test_a_step_without_data_takes_what_a_step_with_data_takes(recipe: Path, layers: int | None) -> None:
    cfg = config(recipe, alignment_mode="none", handoff_weight=0.5, handoff_source_layers=layers or "none")
    student, teacher = (
        load_config(name, SMALL.format(count), flag=side)
        for side, name, count in (("student", cfg.student, 5), ("teacher", cfg.first_teacher, 6))
    )
    planner = StepPlanner(cfg, student, teacher, torch.float32, "cpu")
    batch = BatchShape(4, 48, 72, 48, handed=29, follow=30)
    planned = planner.plan(batch, checkpointing=False)
    model = AutoModelForCausalLM.from_config(student, attn_implementation=ROW_ATTENTION).train()
    shapes = KVShape.from_config(teacher), KVShape.from_config(student)
    module = DistillationModule(model, following_map=following_map(*shapes, layers))
    inputs = planner._inputs(batch, aligned=False, handed=True)
    memory = LiveMemory("cpu")
    row = inputs.continuation
    assert row is not None and inputs.teacher is not None and isinstance(inputs.teacher.states, KVStates)
    given = [*inputs.teacher.states.keys, *vars(inputs.batch).values(), *vars(row).values()]
    given += [*vars(inputs.labelled).values(), *vars(row.labelled).values(), *module.parameters(), *module.buffers()]
    memory.ignore(tensor for tensor in given if isinstance(tensor, torch.Tensor))
    drop_gradients(module.parameters())
    with memory:
        module(step=inputs)[0].backward()
    assert planned.teacher_kv == kv_bytes(shapes[0], batch, 4)
    assert planned.peak - planned.teacher_kv == pytest.approx(memory.peak, rel=0.03)
    assert planned.handoff > 0.1 * planned.activations and planned.aligner == planned.student_kv == 0
    plain = StepPlanner(config(recipe, alignment_mode="none"), student, teacher, torch.float32, "cpu")
    assert plain.plan(batch, checkpointing=False).peak == planned.peak - planned.handoff - planned.teacher_kv


def test_the_rows_of_the_data_say_how_long_prompts_and_answers_are(recipe: Path) -> None:
    cfg = config(recipe, handoff_weight=1, tokens_per_batch=0)
    plan = RunPlan(cfg, GPU)
    loader: BatchLoader = load_run_data(cfg, load_tokenizer(cfg), rank=0, world_size=1).loader
    prompts = [sum(segment == 1 for segment in sample.segment_ids) for sample in loader.samples]
    answers = [len(row.segment_ids) - count for row, count in zip(loader.samples, prompts, strict=True)]
    largest = plan.rows.largest
    assert (largest.handed, largest.follow) == (max(prompts) - 1, max(answers) + 1)
    assert plan.rows.handed_tokens is not None and plan.rows.followed_tokens is not None
    assert sum(prompts) <= plan.rows.handed_tokens + len(prompts) <= plan.rows.padded_tokens
    assert plan.work is not None
    plain = RunPlan(config(recipe, tokens_per_batch=0), GPU).work
    assert plain is not None and plan.work.student > 1.2 * plain.student
    # A map of 24 layers × 4 · 256 × 128 numbers and 128, for keys and values: of each a forward and a gradient.
    numbers = 2 * 24 * (4 * 256 * 128 + 128)
    assert plan.map_parameters == numbers
    assert plan.work.aligner - plain.aligner == pytest.approx(4 * numbers * plan.rows.handed_tokens)
    bare = RunPlan(config(recipe, tokens_per_batch=0), GPU)
    assert plan.states().optimizer - bare.states().optimizer == 8 * numbers
    assert plan.checkpoint - bare.checkpoint == 12 * numbers


def test_rows_that_cannot_be_read_are_all_answer(recipe: Path) -> None:
    """As on another machine than that of the data."""
    plan = RunPlan(config(recipe, handoff_weight=1, tokens_per_batch=0, datasets="gsm8k"), GPU, 40)
    largest = plan.rows.largest
    assert (largest.handed, largest.follow) == (1, 64) and plan.rows.followed_tokens == 40 * 64


@pytest.mark.parametrize("layers", [1, 4])
def test_the_fit_takes_what_is_planned(recipe: Path, layers: int) -> None:
    teacher, student = KVShape(6, 2, 32, 4), KVShape(5, 2, 16, 4)
    cfg = config(recipe, handoff_weight=1, handoff_source_layers=layers)
    generator = torch.Generator().manual_seed(0)

    def states(shape: KVShape) -> KVStates:
        size = (4, 41, shape.num_key_value_heads, shape.head_dim)
        return KVStates(
            *(tuple(torch.randn(size, generator=generator).transpose(1, 2) for _ in range(shape.num_hidden_layers))
              for _ in range(2))
        )  # fmt: skip

    pair = states(teacher), states(student)
    cache_map = CacheMap(teacher, student, following_map(teacher, student, layers).sources)
    memory = LiveMemory("cuda")
    memory.ignore(layer for side in pair for part in side for layer in part)
    with memory:
        moments = MapMoments(cache_map, torch.device("cpu"))
        moments.update(*pair, torch.ones(4, 41, dtype=torch.bool), torch.tensor([0, 1, 0, 1]))
        fit_map(cache_map, moments)
    planned = map_fitting_bytes(cfg, teacher, student, BatchShape(4, 60, 0, 60, handed=40, follow=20), 4)
    assert 0.8 * memory.peak <= planned <= 1.5 * memory.peak, (planned, memory.peak)


def test_phases_and_lines_of_the_plan_name_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = RunPlan(config(recipe, handoff_weight=1, kv_weight="auto:0.5", tokens_per_batch=0), GPU)
    names = list(Phases(plan).peaks)
    assert names.index(CALIBRATED_MAP) < names.index(CALIBRATED_WEIGHT) < names.index(TRAINING)
    # Sums of products of 4 · 256 channels, two halves, 23 groups of layers, keys and values: fp64.
    assert Phases(plan).peaks[CALIBRATED_MAP] > 2 * 23 * 2 * 8 * 1024**2
    assert main(["plan", str(recipe), "--set", "handoff_weight=1"]) == 0
    printed = capsys.readouterr().out
    assert f"map of the handoff {plan.map_parameters:,}" in printed
    assert "handoff: answers over the mapped cache, and map" in printed and f"peak in {CALIBRATED_MAP}" in printed


def test_what_does_not_fit_is_never_advised_to_compute_layers_again(recipe: Path) -> None:
    """A layer that is computed again takes no cache: fewer rows are what is left."""
    cfg = config(recipe, handoff_weight=1, tokens_per_batch=0, batch_size=8)
    whole, half = (RunPlan(config(recipe, handoff_weight=1, tokens_per_batch=0, batch_size=n), GPU) for n in (8, 4))
    between = int(((whole.peak + half.peak) / 2 + 2**30) / 0.95)
    tight = RunPlan(cfg, Machine(1, 1, between))
    advice = tight.advice()
    assert advice and not tight.fits and not any("checkpointing" in line for line in advice), advice
    changes = dict(line.split(": ") for line in advice)
    assert RunPlan(config(recipe, **{"handoff_weight": 1, "tokens_per_batch": 0, **changes}), tight.machine).fits
    assert {rows for (_, checkpointing), rows in tight.largest_rows().items() if checkpointing} == {0}
