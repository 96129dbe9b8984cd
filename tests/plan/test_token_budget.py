"""Tokens of a micro-batch that a run leaves open: what fits on a GPU, none on a CPU, none where rows are whole."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest

from kvds.config import RunConfig
from kvds.plan import token_budget
from kvds.plan.batch_shape import BatchShape
from kvds.plan.estimate import Machine, RunPlan
from kvds.plan.rows import RowPlan
from kvds.plan.token_budget import MOST_TOKENS, with_token_budget
from tests.harness.plan_recipe import config
from tests.harness.real_data import data_folder

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 2**30
GPU = Machine(1, 1, 80 * GIB)


def run(**changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "output_dir": "outputs/none", "teacher_name": "t", "student_name": "s", "batch_size": 16,
        "gradient_accumulation_steps": 8, **changes,
    }  # fmt: skip
    return RunConfig(**settings)


@pytest.mark.parametrize(
    ("memory", "per_token", "changes", "expected"),
    [
        (80, 0, {}, MOST_TOKENS),
        (80, 0, {"gradient_accumulation_steps": 2}, 16 * 2 * 512),  # no more than a step has
        (80, 0, {"gradient_accumulation_steps": 1, "batch_size": 1}, 512),
        (80, GIB // 512, {}, 28 * 1024),  # 0.9 of (0.95 · 80 − 1) GiB, less 10 GiB that are always taken, in thousands
        (20, GIB // 128, {}, 512),  # 6.2 GiB, of which a thousand takes 8
        (20, GIB // 64, {}, 0),  # not one row of max_length
    ],
)
def test_the_longest_row_that_fits_is_taken(
    memory: int, per_token: int, changes: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_budget, "_peak", lambda cfg, machine, tokens: 10 * GIB + per_token * tokens)
    machine = Machine(1, 1, memory * GIB)
    assert with_token_budget(run(**changes), machine).tokens_per_batch == expected


def test_a_number_stays_and_a_cpu_pads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_budget, "_peak", lambda *_: pytest.fail("nobody asked"))
    assert with_token_budget(run(tokens_per_batch=4096), GPU).tokens_per_batch == 4096
    assert with_token_budget(run(tokens_per_batch=0), GPU).tokens_per_batch == 0
    assert with_token_budget(run(), Machine(0, 1, GIB)).tokens_per_batch == 0
    small = run(gradient_accumulation_steps=1, batch_size=8)  # no more than its padded rows would be
    assert with_token_budget(small, GPU).tokens_per_batch == 8 * 512


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"kv_method": "rkv", "kv_budget": 8}, "--kv_method rkv"),
        ({"alignment_mode": "relation"}, "--alignment_mode relation"),
        ({"attn_implementation": "eager"}, "--attn_implementation eager"),
        ({"packing": True}, "--packing"),
        ({"group_by_length": True}, "--group_by_length"),
    ],
)
def test_what_needs_rows_of_its_own_keeps_them_and_says_so(
    changes: dict[str, Any], flag: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(token_budget, "_peak", lambda *_: pytest.fail("nobody asked"))
    with caplog.at_level(logging.INFO, "kvds"):
        assert with_token_budget(run(**changes), GPU).tokens_per_batch == 0
    assert f"micro-batches: 16 rows, for {flag}" in caplog.text


def test_what_is_given_fits_by_the_plan() -> None:
    recipe = REPOSITORY / "launch/recipes/quickstart_teacher.yaml"
    cfg = config(recipe, tokens_per_batch="none", batch_size=512, deepspeed_config="ds_configs/zero3.json")
    whole = token_budget._peak(cfg, Machine(1, 1, GIB), 512 * cfg.max_length)
    machine = Machine(1, 1, int((0.6 / 0.9 * whole + GIB) / 0.95))  # of which 0.6 of that can be taken
    tokens = with_token_budget(cfg, machine).tokens_per_batch or 0
    assert 0 < tokens < 512 * cfg.max_length
    assert token_budget._peak(cfg, machine, tokens) <= 0.9 * machine.usable
    assert token_budget._peak(cfg, machine, 2 * tokens) > 0.9 * machine.usable


def test_the_plan_of_one_row_in_compiled_layers_is_what_a_gpu_took() -> None:
    models = data_folder() / "models"
    cfg = config(
        REPOSITORY / "launch/recipes/qwen2_zero3_1gpu.yaml", teacher_name=models / "qwen2-1.5b",
        student_name=models / "qwen2-0.5b", teacher_init="random", student_init="random", tokens_per_batch=40960,
    )  # fmt: skip
    with (REPOSITORY / "benchmarks/results/step_forms_qwen2_h200.csv").open() as file:
        measured = {row["rows"]: row for row in csv.DictReader(file) if row["form"] == "zero3, one row, compiled"}
    for count in ("32", "128", "256"):
        tokens = round(float(measured[count]["tokens_run"]))
        shape = BatchShape(1, tokens, round(0.6 * tokens), tokens, int(count))  # GSM8K labels six tokens of ten
        plan = RunPlan(cfg, Machine(1, 1, 141 * GIB), RowPlan(shape, 511, None, None, None, ""))
        assert plan.peak / GIB == pytest.approx(float(measured[count]["peak_gib"]), rel=0.05)
