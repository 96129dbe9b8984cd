"""What is told about the student's keys and values."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from kvds.config.recipe import parse_run_config
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.tracking.tracker import Tracker
from kvds.training.kv_health import KVHealth
from kvds.training.run import train

REPOSITORY = Path(__file__).resolve().parents[2]


def measured(norm: float = 1.0, rank: float = 1.0, kv: float = 4.0, rest: float = 1.0, values: float = 1.0) -> Any:
    return {
        "kv/norm_keys": 3.0 * norm, "kv/norm_values": 5.0 * norm * values, "kv/effective_rank_keys": 7.0 * rank,
        "kv/effective_rank_values": 2.0 * rank, "kv/gradient_squares_kv": kv, "kv/gradient_squares_rest": rest,
    }  # fmt: skip


def health_of(state: Any = None, **flags: Any) -> KVHealth:
    """Of a pretrained student under a map that is trained towards it."""
    flags = {"model_name": "m", "output_dir": "o", "direction": "teacher_to_student", "kv_weight": 2} | flags
    cfg = parse_run_config([token for key, value in flags.items() for token in (f"--{key}", str(value))])
    return KVHealth(cfg, state)


def test_ratios_are_against_the_first_measurement() -> None:
    health = health_of()
    first, later = measured(), measured(norm=0.8, rank=0.6, kv=9.0, rest=4.0)
    assert health.update(first) == {} and health.update(later) == {}
    ratios = ("kv/norm_ratio", "kv/effective_rank_ratio", "kv/gradient_ratio")
    assert [first[key] for key in ratios] == pytest.approx([1, 1, 2])
    assert [later[key] for key in ratios] == pytest.approx([0.8, 0.6, 1.5])
    assert not any("squares" in key for key in later)


@pytest.mark.parametrize(
    ("name", "fine", "fallen", "text"),
    [
        ("kv_norm", {"norm": 0.51}, {"norm": 0.49}, "the norm of the student's"),
        ("kv_norm", {"values": 0.51}, {"values": 0.49}, "the norm of the student's values fell to 0.49"),
        ("kv_norm", {}, {"norm": math.nan}, "nan"),
        ("kv_effective_rank", {"rank": 0.51}, {"rank": 0.49}, "the effective rank of the student's"),
        ("kv_gradient", {"kv": 4.1e-4}, {"kv": 3.9e-4}, "the KV loss's gradient vanishes"),
        ("kv_gradient", {}, {"kv": 0.0}, "the KV loss's gradient vanishes: 0 times"),
        ("kv_gradient", {}, {"kv": math.nan}, "vanishes: nan"),
    ],
)
def test_what_falls_too_far_is_told_once(name: str, fine: Any, fallen: Any, text: str) -> None:
    health = health_of()
    assert health.update(measured()) == {}
    assert health.update(measured(**fine)) == {}
    told = health.update(measured(**fallen))
    assert list(told) == [name] and text in told[name] and "(a " in told[name]
    assert health.update(measured(**fallen)) == {}
    # Another attempt knows the start and what was told.
    again = health_of(health.state)
    assert again.update(measured(**fallen)) == {}
    assert list(health_of({**health.state, "told": []}).update(measured(**fallen))) == [name]


def test_a_gradient_that_falls_with_its_schedule_is_fine() -> None:
    health = health_of()
    assert health.update(measured()) == {}
    assert health.update(measured(kv=4e-6), schedule=1e-3) == {}
    assert health.update(measured(kv=0.0), schedule=0.0) == {}
    assert list(health.update(measured(kv=1e-9), schedule=1e-2)) == ["kv_gradient"]


def test_no_gradient_from_the_beginning_is_told() -> None:
    assert list(health_of().update(measured(kv=0.0))) == ["kv_gradient"]


@pytest.mark.parametrize(
    ("flags", "collapse", "gradient"),
    [
        (
            {}, "(a smaller --kv_weight than 2, --aligner_update frozen or --direction student_to_teacher)",
            "(a larger --kv_weight than 2, or --kv_weight hold:SHARE)",
        ),
        (
            {"direction": "student_to_teacher", "kv_weight": "auto:0.5"},
            "(a smaller --kv_weight than auto:0.5 or --aligner_update frozen)",
            "(a larger --kv_weight than auto:0.5, or --kv_weight hold:SHARE)",
        ),
        (
            {"aligner_update": "frozen", "map_start": "ridge", "kv_weight": "hold:0.5"},
            "(a smaller --kv_weight than hold:0.5 or --direction student_to_teacher)",
            "(a larger --kv_weight than hold:0.5)",
        ),
        (
            {"alignment_mode": "relation", "direction": "student_to_teacher", "kv_method": "full"},
            "(a smaller --kv_weight than 2)", "(a larger --kv_weight than 2, or --kv_weight hold:SHARE)",
        ),
    ],
)  # fmt: skip
def test_what_is_set_already_is_not_advised(flags: dict[str, Any], collapse: str, gradient: str) -> None:
    health = health_of(**flags)
    assert health.update(measured()) == {}
    told = health.update(measured(norm=0.1, rank=0.1, kv=0.0))
    assert told["kv_norm"].endswith(collapse) and told["kv_effective_rank"].endswith(collapse)
    assert told["kv_gradient"].endswith(gradient)


def test_the_rank_of_a_student_from_scratch_may_fall() -> None:
    """Weights at random have full rank; what is learned has less. A norm that falls, or no number at all, is told."""
    health = health_of(student_init="random")
    assert health.update(measured()) == {}
    later = measured(rank=0.1)
    assert health.update(later) == {} and later["kv/effective_rank_ratio"] == pytest.approx(0.1)
    assert list(health.update(measured(norm=0.1, rank=0.1))) == ["kv_norm"]
    assert list(health.update(measured(rank=math.nan))) == ["kv_effective_rank"]


def test_steps_without_measurements_say_nothing() -> None:
    health = health_of()
    metrics = {"loss/task": 1.0}
    assert health.update(metrics) == {} and metrics == {"loss/task": 1.0}
    # A first batch whose rows do not vary is no start.
    assert health.update(measured(rank=0.0)) == {} and health.update(measured()) == {}
    assert list(health.update(measured(rank=0.4))) == ["kv_effective_rank"]


def test_a_tag_reaches_mlflow(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, params={}, tags={}, system_metrics=False)
    tracker.set_tag("warning/kv_norm", "step 3: fell")
    tracker.finish()
    run = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(tracker.run_id or "")
    assert run.data.tags["warning/kv_norm"] == "step 3: fell"


def test_a_collapsing_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The joint map towards the student with a large weight shrinks keys and values: told in log and MLflow."""
    train_problem_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    values = {
        "model_name": tmp_path / "model", "student_init": "random", "tokenizer_name": tmp_path / "tokenizer",
        "synthetic_problems": 64, "max_length": 64, "eval_subset_size": 0, "direction": "teacher_to_student",
        "kv_weight": 1000, "lr": 0.05, "batch_size": 8, "max_steps": 25, "logging_steps": 5, "save_steps": 0,
        "lr_scheduler_type": "constant", "calibration_batches": 1, "seed": 1, "kv_parts": "kv",
        "deepspeed_config": REPOSITORY / "ds_configs/zero3_cpu.json", "output_dir": tmp_path / "run",
    }  # fmt: skip
    log = logging.getLogger("kvds")
    log.addHandler(caplog.handler)
    try:
        train(parse_run_config([token for key, value in values.items() for token in (f"--{key}", str(value))]))
    finally:
        log.removeHandler(caplog.handler)
    lines = [record.getMessage() for record in caplog.records if "of the student's" in record.getMessage()]
    [norm] = [line for line in lines if "the norm of" in line]
    run_id = (tmp_path / "run/mlflow_run_id").read_text().strip()
    tags = MlflowClient(f"sqlite:///{tmp_path / 'run/mlflow.db'}").get_run(run_id).data.tags
    assert tags["warning/kv_norm"] == norm and norm.startswith("step ")
