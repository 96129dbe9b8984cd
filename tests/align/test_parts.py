"""What of keys and values is matched: what ``kv_parts`` means under each mode, and a run of the default."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from kvds.align import ALIGNERS, aligner_config_dict, aligner_from_config_dict, build_aligner
from kvds.align.diagnostics import parameter_counts
from kvds.align.loss import parts_of
from kvds.checkpoint.aligner_file import load_aligner
from kvds.config import RunConfig
from kvds.config.recipe import parse_run_config
from kvds.config.resume_rules import check_resumable
from kvds.config.settings import AlignmentSettings
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.errors import InputError
from kvds.kv import KVShape
from kvds.plan.work import aligner_flops
from kvds.training.run import train
from tests.align.test_loss import SELECTION, random_states, with_grad

REPOSITORY = Path(__file__).resolve().parents[2]
STUDENT, TEACHER = KVShape(3, 2, 3, 2, hidden_size=12), KVShape(5, 4, 4, 4, hidden_size=16)
BOTH, VALUES = ("key", "value"), ("value",)
AUTO = {"flat": VALUES, "structured": VALUES, "relation": BOTH, "structural_kv": BOTH, "hidden": BOTH}
CHOICES = {"kv": BOTH, "k": ("key",), "v": VALUES}


@pytest.mark.parametrize("mode", ALIGNERS)
def test_auto_is_the_values_under_a_map_and_both_elsewhere(mode: str) -> None:
    settings = AlignmentSettings(alignment_mode=mode)
    assert settings.kv_parts == "auto" and parts_of(settings) == AUTO[mode]
    aligner = build_aligner(STUDENT, TEACHER, settings)
    assert tuple(aligner.parts) == (("hidden_state",) if mode == "hidden" else AUTO[mode])
    explicit = "v" if AUTO[mode] == VALUES else "kv"
    asked = build_aligner(STUDENT, TEACHER, AlignmentSettings(alignment_mode=mode, kv_parts=explicit))
    # What is saved names the parts, whatever a later default is; the part starts where it did beside the other.
    assert aligner.settings == asked.settings and aligner.settings.kv_parts == explicit
    for name, value in aligner.state_dict().items():
        assert torch.equal(value, asked.state_dict()[name]), name
    counts = parameter_counts(STUDENT, TEACHER, aligner.settings)
    assert counts[mode] == sum(p.numel() for p in aligner.parameters())
    assert mode != "flat" or counts["structural_kv"] == 2 * counts["flat"]  # the same map, which it needs twice


@pytest.mark.parametrize("parts", CHOICES)
@pytest.mark.parametrize("mode", ["flat", "structured", "relation"])
def test_parts_asked_for_are_those_of_a_saved_aligner(mode: str, parts: str) -> None:
    settings = AlignmentSettings(alignment_mode=mode, kv_parts=parts)
    aligner = build_aligner(STUDENT, TEACHER, settings)
    again = aligner_from_config_dict(aligner_config_dict(aligner))
    again.load_state_dict(aligner.state_dict())
    assert parts_of(settings) == tuple(aligner.parts) == tuple(again.parts) == CHOICES[parts]  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_the_default_loss_is_that_of_the_values_and_reaches_the_student(mode: str) -> None:
    aligner = build_aligner(STUDENT, TEACHER, AlignmentSettings(alignment_mode=mode))
    student = with_grad(random_states(STUDENT, 1, dtype=torch.float32))
    loss = aligner(student, random_states(TEACHER, 2, dtype=torch.float32), SELECTION)
    assert loss.key_loss is None and loss.key_layers is None
    assert loss.value_loss == loss.loss > 0
    loss.loss.backward()
    assert all(layer.grad is not None and layer.grad.any() for layer in student.values)
    assert all(layer.grad is None for layer in student.keys)


@pytest.mark.parametrize("mode", ["hidden", "structural_kv"])
def test_modes_of_no_one_part_take_auto_and_both_and_refuse_one(mode: str) -> None:
    required = {"model_name": "gpt2", "output_dir": "x", "alignment_mode": mode}
    auto, both = (RunConfig(**required, kv_parts=parts) for parts in ("auto", "kv"))
    assert parts_of(auto) == parts_of(both) == BOTH
    for parts in ("k", "v"):
        with pytest.raises(InputError, match=f"kv_parts={parts}: expected auto or kv with --alignment_mode {mode} "):
            RunConfig(**required, kv_parts=parts)
    with pytest.raises(InputError, match="kv_parts=both: expected .*auto, kv, k, v"):
        RunConfig(**required, kv_parts="both")


def test_a_run_of_both_parts_goes_on_only_with_both(tmp_path: Path) -> None:
    RunConfig(model_name="gpt2", output_dir="x", kv_parts="kv").save(tmp_path / "config.yaml")
    with pytest.raises(InputError, match="--kv_parts auto: the checkpoint in x was trained with kv"):
        check_resumable(RunConfig(model_name="gpt2", output_dir="x"), tmp_path / "config.yaml")
    check_resumable(RunConfig(model_name="gpt2", output_dir="x", kv_parts="kv"), tmp_path / "config.yaml")


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_the_default_takes_half_the_maps_work(mode: str) -> None:
    required = {"model_name": "gpt2", "output_dir": "x", "alignment_mode": mode}
    work = [aligner_flops(RunConfig(**required, **more), STUDENT, TEACHER, 8) for more in ({}, {"kv_parts": "kv"})]
    assert 0 < work[0] == work[1] / 2


def test_a_default_run_matches_the_values_alone(tmp_path: Path) -> None:
    train_problem_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for name, seed, layers in (("teacher", 1, 3), ("student", 2, 2)):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(tokenizer), num_hidden_layers=layers, hidden_size=16, intermediate_size=24,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    # Without the task, and without the momentum that moves what has no gradient.
    values = {
        "teacher_name": tmp_path / "teacher", "student_name": tmp_path / "student", "synthetic_problems": 8,
        "tokenizer_name": tmp_path / "tokenizer", "max_length": 64, "eval_subset_size": 0, "kv_weight": 1.0,
        "task_weight": 0, "optimizer": "sgd", "lr": 0.05, "batch_size": 8, "max_steps": 3, "logging_steps": 1,
        "save_steps": 0, "calibration_batches": 1, "report_to": "none",
        "deepspeed_config": REPOSITORY / "ds_configs/zero3_cpu.json", "output_dir": tmp_path / "run",
    }  # fmt: skip
    train(parse_run_config([token for key, value in values.items() for token in (f"--{key}", str(value))]))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss/kv" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    assert not any(name.startswith("loss/kv_keys") for line in lines for name in line)
    assert all(0 < line["loss/kv"] == line["loss/kv_values"] for line in trained)
    assert trained[-1]["loss/kv"] < trained[0]["loss/kv"]
    assert {"loss/kv_values_layer_00", "kv/norm_keys", "kv/norm_values", "kv/gradient_ratio"} <= trained[0].keys()
    aligner = load_aligner(tmp_path / "run/map_aligner.pt")
    assert tuple(aligner.parts) == VALUES and not any("key" in name for name in aligner.state_dict())
    begun, student = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters())
        for name in ("student", "run/student")
    )
    moved = {name for name, value in student.items() if not torch.equal(value, begun[name])}
    # The last layer's keys reach no value: nothing asks them to change.
    attention = "model.layers.{}.self_attn.{}_proj.weight".format
    assert {attention(0, "v"), attention(1, "v"), attention(0, "k")} <= moved and attention(1, "k") not in moved


def test_a_saved_aligner_holds_its_seed_among_the_settings_and_starts_from_it_again() -> None:
    aligner = build_aligner(STUDENT, TEACHER, AlignmentSettings(alignment_mode="flat"), seed=3)
    saved = aligner_config_dict(aligner)
    assert saved.keys() == {"student_shape", "teacher_shape", "settings"}
    assert saved["settings"] == {**dataclasses.asdict(aligner.settings), "seed": 3}
    again = aligner_from_config_dict(saved)
    other = build_aligner(STUDENT, TEACHER, AlignmentSettings(alignment_mode="flat"))
    for name, value in aligner.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
        assert name != "parts.value.weight" or not torch.equal(other.state_dict()[name], value)


def test_a_run_is_an_alignment_with_more() -> None:
    run = RunConfig(model_name="gpt2", output_dir="x", alignment_mode="flat", kv_loss="l1", seed=3)
    settings = build_aligner(STUDENT, TEACHER, run, run.seed).settings
    assert type(settings) is AlignmentSettings
    assert settings == AlignmentSettings(
        alignment_mode="flat", kv_loss="l1", layer_map="endpoint", kv_parts="v", map_start="ridge"
    )
