"""Several teachers: a weighted sum of KV losses, one aligner each, one teacher's keys and values at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from kvds.align import AlignerGroup, aligner_config_dict, aligner_from_config_dict, build_aligner, members_of
from kvds.checkpoint.aligner_file import load_aligner
from kvds.cli import main
from kvds.data.labels import LabelledPositions
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput, TeacherKV
from kvds.errors import InputError
from kvds.kv import KVShape, select_tokens
from tests.distillation.test_module import ALL
from tests.harness.distillation_setup import SELECTION, Setup, batch_of, counts, results, samples, setup, step_input

REPOSITORY = Path(__file__).resolve().parents[2]
WEIGHTS = LossWeights(task=0.7, kv=1.5)


def several(made: Setup, others: list[Setup], weights: tuple[float, ...]) -> DistillationModule:
    members = [made.module.aligner, *(other.module.aligner for other in others)]
    return DistillationModule(made.module.student, AlignerGroup(members, weights), head_chunks=2)  # type: ignore[arg-type]


def step_of(teachers: list[Any], watch: bool = False) -> StepInput:
    batch = batch_of(list(samples()), counts(samples(), SELECTION))

    def source(teacher: Any) -> TeacherKV:
        selection = select_tokens("full", None, batch.segment_ids, batch.attention_mask)
        return TeacherKV(teacher(batch).states, selection)

    sources = tuple(lambda teacher=teacher: source(teacher) for teacher in teachers)
    return StepInput(batch, LabelledPositions.from_labels(batch.labels), None, None, None, WEIGHTS, watch, sources)


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_two_identical_teachers_are_one(mode: str) -> None:
    one, twin = setup(alignment_mode=mode), setup(alignment_mode=mode)
    batch = batch_of(list(samples()), counts(samples(), SELECTION))
    expected_loss, expected = results(one.module, [step_input(batch, one.teacher, WEIGHTS)])
    both = several(one, [twin], (0.3, 0.7))
    loss, found = results(both, [step_of([one.teacher, twin.teacher])])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        if name.startswith("student."):
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
            continue
        for member, weight in ((0, 0.3), (1, 0.7)):
            own = found[name.replace("aligner.", f"aligner.members.{member}.")]
            torch.testing.assert_close(own, weight * gradient, rtol=1e-5, atol=1e-7)


def test_different_teachers_are_summed_by_weight_and_watched() -> None:
    one, other = setup(alignment_mode="structured"), setup(alignment_mode="flat", kv_loss="l1")
    batch = batch_of(list(samples()), counts(samples(), SELECTION))
    singles = [m.module(step_input(batch, m.teacher, ALL))[1] for m in (one, other)]
    other.module.student = one.module.student
    _, metrics = several(one, [other], (2.0, 0.5))(step_of([one.teacher, other.teacher], watch=True))
    for number, single in enumerate(singles):
        torch.testing.assert_close(metrics[f"loss/kv_teacher_{number}"], single["loss/kv"], rtol=1e-5, atol=0)
    for key in ("loss/kv", "loss/kv_keys", "loss/kv_values"):
        torch.testing.assert_close(metrics[key], 2 * singles[0][key] + 0.5 * singles[1][key], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        metrics["loss/total"], 0.7 * metrics["loss/task"] + 1.5 * metrics["loss/kv"], rtol=1e-5, atol=0
    )
    assert {"kv/norm_keys", "kv/selected_share"} <= set(metrics)


@pytest.mark.parametrize("holding", [False, True], ids=["", "with one who keeps them"])
def test_one_teachers_states_are_gone_before_the_next_runs(holding: bool) -> None:
    made = [setup(alignment_mode="structured", impl="auto") for _ in range(3)]
    kept: list[Any] = []
    storages: list[StorageWeakRef] = []
    left: list[int] = []

    def watching(teacher: Any) -> Any:
        def call(batch: Any) -> Any:
            left.append(sum(not storage.expired() for storage in storages))
            output = teacher(batch)
            kept.append(output if holding else None)
            storages.extend(StorageWeakRef(x.untyped_storage()) for x in (*output.states.keys, *output.states.values))
            return output

        return call

    module = several(made[0], made[1:], (1.0, 1.0, 1.0))
    loss, _ = module(step_of([watching(m.teacher) for m in made]))
    left.append(sum(not storage.expired() for storage in storages))
    assert left == ([0, 6, 12, 18] if holding else [0, 0, 0, 0]) and len(storages) == 18
    loss.backward()
    assert all(float(p.grad.abs().sum()) > 0 for m in made for p in m.module.aligner.parameters())  # type: ignore


def test_a_group_survives_its_file() -> None:
    shape = KVShape(2, 2, 4, 4)
    settings = setup().module.aligner.settings  # type: ignore[union-attr]
    group = AlignerGroup([build_aligner(shape, KVShape(n, 2, 6, 4), settings) for n in (3, 4)], (0.25, 0.75))
    again = aligner_from_config_dict(aligner_config_dict(group))
    assert isinstance(again, AlignerGroup) and again.weights == (0.25, 0.75)
    again.load_state_dict(group.state_dict())
    assert [member.teacher_shape.num_hidden_layers for _, member in members_of(again)] == [3, 4]


# -- through the launcher -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers of different shape, a student, and a stranger with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("models")
    train_problem_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for name, layers, hidden in (("first", 3, 32), ("second", 4, 24), ("student", 2, 16)):
        torch.manual_seed(layers)
        config = Qwen2Config(
            vocab_size=len(tokenizer), num_hidden_layers=layers, hidden_size=hidden, intermediate_size=24,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def flags(models: Path, output: Path, **changes: object) -> list[str]:
    values: dict[str, object] = {
        "teacher_names": f"{models / 'first'} {models / 'second'}", "teacher_weights": "0.3 0.7",
        "student_name": models / "student", "tokenizer_name": models / "tokenizer", "synthetic_problems": 16,
        "map_start": "random",  # so that a few steps bring the maps closer
        "max_length": 64, "eval_subset_size": 4, "max_new_tokens": 2, "report_to": "none", "kv_weight": 0.8,
        "calibration_batches": 1, "batch_size": 2, "max_steps": 4, "save_steps": 2, "lr": 0.01, "logging_steps": 1,
        "kv_method": "rkv", "kv_budget": 0.5, "teacher_placement": "zero3", "kv_parts": "kv",
        "deepspeed_config": REPOSITORY / "ds_configs/zero3_cpu.json", "output_dir": output, **changes,
    }  # fmt: skip
    return [token for key, value in values.items() for token in (f"--{key}", *str(value).split())]


@pytest.mark.multiprocess
def test_two_ranks_train_two_aligners_and_resume_both(models: Path, tmp_path: Path) -> None:
    def launch(*runs: list[str]) -> None:
        (tmp_path / "runs.json").write_text(json.dumps(dict(enumerate(runs))))
        command = ["deepspeed", "--num_accelerators", "2", "--master_port", str(20000 + os.getpid() % 20000)]
        command += ["tests/harness/ranked_runs.py", str(tmp_path / "runs.json")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]

    run = tmp_path / "run"
    launch(flags(models, run))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record["step"] > 0]  # before step 1: how well the maps start
    for record in records[:4]:
        kv = 0.3 * record["loss/kv_teacher_0"] + 0.7 * record["loss/kv_teacher_1"]
        assert record["loss/kv"] == pytest.approx(kv, rel=1e-5)
    assert records[3]["loss/kv_teacher_0"] < records[0]["loss/kv_teacher_0"]
    assert "eval/all/kv_loss" in records[-1]
    straight = load_aligner(run / "map_aligner.pt").state_dict()
    assert {name.split(".")[1] for name in straight} == {"0", "1"}
    student = load_file(run / "student/model.safetensors")
    # Back to step 2, and on again: the same bits.
    (run / "checkpoints/latest").write_text("step-000002")
    launch(flags(models, run))
    again = load_aligner(run / "map_aligner.pt").state_dict()
    assert all(torch.equal(straight[name], again[name]) for name in straight)
    resumed = load_file(run / "student/model.safetensors")
    assert all(torch.equal(student[name], resumed[name]) for name in student)
    # A checkpoint is exported with both; half way there the maps were others.
    assert main(["export", "--run", str(run), "--step", "2", "--output", str(tmp_path / "half")]) == 0
    half = load_aligner(tmp_path / "half/map_aligner.pt").state_dict()
    for member in ("members.0", "members.1"):
        assert any(not torch.equal(half[name], straight[name]) for name in half if name.startswith(member))
    with pytest.raises(InputError, match="several teachers"):
        from kvds.commands.profile import _of_run

        _of_run(run)


def test_a_teacher_of_another_tokenizer_is_refused(models: Path, tmp_path: Path) -> None:
    from kvds.config.recipe import parse_run_config
    from kvds.models.tokenizer import check_same_tokenizer, load_tokenizer

    stranger = tmp_path / "stranger"
    AutoModelForCausalLM.from_pretrained(models / "second").save_pretrained(stranger)
    tokenizer = AutoTokenizer.from_pretrained(models / "tokenizer")
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(stranger)
    cfg = parse_run_config(flags(models, tmp_path / "run", teacher_names=f"{models / 'first'} {stranger}"))
    with pytest.raises(InputError, match=f"--teacher_names={stranger}: its tokenizer .* differs .* one vocabulary"):
        check_same_tokenizer(cfg, load_tokenizer(cfg))
