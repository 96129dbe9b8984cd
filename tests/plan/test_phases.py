"""Calibration and evaluation as phases of a plan, against the memory that the run's own code takes in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvds.align import build_aligner
from kvds.align.fitting import AlignmentMoments
from kvds.align.mix_fitting import MixFitting
from kvds.cli import main
from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.data.encoding import EncodedSample
from kvds.evaluation import model as evaluation
from kvds.evaluation.model import completion_losses
from kvds.kv import KVStates, Selection, open_capture
from kvds.models.own_logits import EVALUATED_LOGITS
from kvds.plan import phases
from kvds.plan.batch_shape import BatchShape
from kvds.plan.estimate import Machine, RunPlan
from kvds.plan.live_memory import LiveMemory
from kvds.plan.phases import (
    CALIBRATED_ALIGNER,
    CALIBRATED_WEIGHT,
    GENERATION,
    LOSSES,
    TRAINING,
    WRITING,
    Phases,
    fitting_bytes,
)
from tests.harness.plan_recipe import config

SMALL = "hidden_size=64,intermediate_size=160,num_attention_heads=4,head_dim=16,vocab_size=512,num_hidden_layers={}"
MODES = [mode for mode in ALIGNMENT_MODES if mode != "none"]


def small_plan(recipe: Path, **changes: Any) -> RunPlan:
    sizes = {"student_config_overrides": SMALL.format(3), "teacher_config_overrides": SMALL.format(4)}
    initial = {"student_init": "random", "teacher_init": "random"}
    return RunPlan(config(recipe, **(sizes | initial | changes)), Machine(1, 1, 80 * 2**30), 40)


def test_the_phases_in_their_order(recipe: Path) -> None:
    found = Phases(small_plan(recipe, kv_weight="hold:0.5"))
    assert list(found.peaks) == [CALIBRATED_ALIGNER, CALIBRATED_WEIGHT, TRAINING, LOSSES, GENERATION]
    assert found.peaks[CALIBRATED_WEIGHT] <= found.peaks[TRAINING] and not found.tight
    assert CALIBRATED_WEIGHT not in Phases(small_plan(recipe, kv_weight=1.0)).peaks
    assert list(Phases(small_plan(recipe, alignment_mode="none")).peaks) == [TRAINING, LOSSES, GENERATION]


def test_a_large_vocabulary_makes_logits_the_largest(recipe: Path) -> None:
    """Training makes a quarter of the logits at once; evaluation holds them in bf16, in fp32 and as logarithms."""
    vocabulary = SMALL.format(3).replace("vocab_size=512", "vocab_size=150000")
    plan = small_plan(
        recipe, student_config_overrides=vocabulary, teacher_config_overrides=vocabulary, batch_size=64, max_length=64,
        gradient_checkpointing="true",
    )  # fmt: skip
    found = Phases(plan)
    assert found.largest == LOSSES
    rows = 4 * 64
    hidden = 2 * rows * 64 * 64
    held = plan.states().held + 2 * plan.student_size.total
    assert rows * plan.rows.row_labelled * 150000 > EVALUATED_LOGITS
    assert found.peaks[LOSSES] == held + hidden + EVALUATED_LOGITS * (2 + 4 + 4)
    machine = Machine(1, 1, int((found.peaks[LOSSES] + 2**30) / 0.95) - 2**20)
    [(phase, remedy)] = Phases(RunPlan(plan.cfg, machine, 40)).tight.items()
    assert phase == LOSSES and "a smaller batch_size" in remedy


@pytest.mark.parametrize("mode", MODES)
def test_every_alignment_is_planned(recipe: Path, mode: str) -> None:
    plan = small_plan(recipe, alignment_mode=mode, batch_size=2)
    left, peak = plan.planner.read_student(plan.rows.largest)
    assert 0 < left <= peak and fitting_bytes(plan, plan.rows.largest) > 0
    assert Phases(plan).peaks[CALIBRATED_ALIGNER] > 0


@pytest.mark.parametrize("start", ["random", "pca", "procrustes", "ridge"])
def test_the_fit_takes_what_is_planned(recipe: Path, start: str) -> None:
    plan = small_plan(recipe, map_start=start, batch_size=2)
    batch = BatchShape(2, 40, 60, 40)
    planner, draw = plan.planner, torch.Generator().manual_seed(0)
    assert planner.teacher_shape is not None
    aligner = build_aligner(planner.student_shape, planner.teacher_shape, plan.cfg)

    def states(shape: Any) -> KVStates:
        size = (2, shape.num_key_value_heads, 40, shape.head_dim)
        layers = tuple(torch.randn(size, generator=draw).bfloat16() for _ in range(shape.num_hidden_layers))
        return KVStates(layers, layers)

    student, teacher = states(planner.student_shape), states(planner.teacher_shape)
    selection = Selection(None, torch.ones(2, 40, dtype=torch.bool))
    peaks = []
    for moments in (MixFitting, AlignmentMoments):  # one pass after the other
        memory = LiveMemory("cuda")
        with memory:
            moments(aligner).update(student, teacher, selection)
        peaks.append(memory.peak)
    assert 0.8 * max(peaks) <= fitting_bytes(plan, batch) <= 1.5 * max(peaks)


def test_the_forwards_take_what_is_planned(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(recipe, batch_size=1, max_length=48)
    model = AutoModelForCausalLM.from_config(plan.student_config, dtype=torch.bfloat16).eval()
    ids = torch.ones(1, 48, dtype=torch.int64)
    memory = LiveMemory("cuda")
    memory.ignore(iter([*model.parameters(), *model.buffers(), ids]))
    with torch.no_grad(), memory, open_capture(model, "kv"):
        model.model(input_ids=ids, use_cache=False)
        left = memory.live
    planned = plan.planner.read_student(BatchShape(1, 48, 30, 48))
    assert planned[0] == pytest.approx(left, rel=0.2) and planned[1] == pytest.approx(memory.peak, rel=0.2)

    # Cross entropy of four rows, whose logits are made at once and then in chunks.
    row = EncodedSample(tuple(range(1, 49)), (1,) * (48 - plan.rows.row_labelled) + (3,) * plan.rows.row_labelled, 0)
    for at_once in (EVALUATED_LOGITS, 40 * 512):
        monkeypatch.setattr(evaluation, "_CHUNK_ELEMENTS", at_once)
        monkeypatch.setattr(phases, "EVALUATED_LOGITS", at_once)
        memory = LiveMemory("cuda")
        memory.ignore(iter([*model.parameters(), *model.buffers()]))
        with torch.no_grad(), memory:
            completion_losses(model, [row] * 4, 0)
        beside = plan.states().held + plan.element * plan.student_size.total
        assert Phases(plan).peaks[LOSSES] - beside == pytest.approx(memory.peak, rel=0.25)


def test_completions_take_a_copy_of_the_student_a_cache_and_their_rows(recipe: Path) -> None:
    changes: dict[str, Any] = {"logit_kd_weight": 1.0, "kv_weight": 1.0, "batch_size": 2, "max_length": 60}
    written = changes | {"on_policy_share": 0.5, "on_policy_max_new_tokens": 40}
    plain, own = small_plan(recipe, **changes), small_plan(recipe, **written)
    copy = 2 * own.student_size.total
    assert own.states().held == plain.states().held + copy and plain.states().copy == 0
    found = Phases(own)
    assert list(found.peaks) == [CALIBRATED_ALIGNER, WRITING, TRAINING, LOSSES, GENERATION]
    shape = own.planner.student_shape
    cache = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 8 * 60
    assert found.peaks[WRITING] >= own.states().held + cache
    assert found.peaks[WRITING] <= own.states().held + cache + 64 * 8 * 512 + own.planner.evaluation_forward(
        BatchShape(8, 60, 1, 0)
    )  # fmt: skip
    # A row is as long as its prompt and a completion; both kinds of rows have logits and a gradient of the head.
    assert plain.rows.largest.tokens < own.rows.largest.tokens <= 60
    assert own.step.logits > plain.step.logits


def test_nobody_s_time_includes_completions(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["plan", str(recipe), "--set", "datasets=synthetic"]
    main(told)
    assert "completions" not in capsys.readouterr().out
    main([*told, "on_policy_share=0.5"])
    out = capsys.readouterr().out
    assert "the student once more, to write completions" in out and "peak in completions of --on_policy_share" in out
    assert "writing completions takes time that is not reckoned (--on_policy_share)" in out
