"""``--dry_run``: what it says of a run, what it finds, and that it leaves nothing.

That it refuses what the run itself refuses is in ``test_bad_input.py``.
"""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from kvds.checkpoint.manifest import FileEntry, write_manifest
from kvds.checkpoint.origin import ORIGIN_FILE, Origin, write_origin
from kvds.config.recipe import parse_run_config
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.errors import InputError
from kvds.plan.estimate import Machine
from kvds.training import dry_run as module
from kvds.training.dry_run import dry_run, this_machine

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    train_problem_tokenizer(folder / "tokenizer")
    vocab_size = len(AutoTokenizer.from_pretrained(folder / "tokenizer"))
    for name, layers in (("teacher", 2), ("student", 1)):
        config = Qwen2Config(
            vocab_size=vocab_size, num_hidden_layers=layers, hidden_size=8, intermediate_size=16, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64,
        )  # fmt: skip
        torch.manual_seed(layers)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def check(models, tmp_path, capsys, monkeypatch):
    """Runs a dry run with changed flags and returns its lines by name; nothing may be written."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def run(**changes: object) -> dict[str, str]:
        values = {
            "teacher_name": models / "teacher", "student_name": models / "student",
            "tokenizer_name": models / "tokenizer", "datasets": "synthetic", "synthetic_problems": 50,
            "max_length": 64, "eval_subset_size": 7, "batch_size": 4, "epochs": 2,
            "deepspeed_config": REPOSITORY / "ds_configs/zero3_cpu.json", "output_dir": tmp_path / "run", **changes,
        }  # fmt: skip
        before = sorted(tmp_path.rglob("*"))
        flags = [token for k, v in values.items() for token in (f"--{k}", *(v if isinstance(v, list) else [str(v)]))]
        dry_run(parse_run_config([*flags, "--dry_run"]))
        assert sorted(tmp_path.rglob("*")) == before
        lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()[1:-1]]
        return {name: text for name, text in lines}

    return run


def test_a_run_in_numbers(check, models):
    found = check(gradient_accumulation_steps=2)
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    parameters = sum(p.numel() for p in student.parameters())
    assert found["data"].startswith("50 rows of synthetic, the longest ") and found["data"].endswith("; 7 held out")
    # 50 rows in steps of 8, the last of each epoch not full.
    assert found["steps"].startswith("14 of 8 rows (4 × 2 × 1 ranks); ") and found["steps"].endswith("fp32")
    assert found["models"].startswith(f"student {parameters:,}, aligner ")
    assert found["output"].endswith("run: a new run")
    assert list(found) == ["output", "data", "steps", "models", "memory", "disk"]


def test_the_ranks_of_the_launcher_count(check, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert this_machine().ranks == 2
    assert check()["steps"].startswith("14 of 8 rows (4 × 1 × 2 ranks)")
    monkeypatch.setenv("RANK", "1")
    assert check() == {}  # the first speaks for all


def test_checkpoints_that_do_not_fit_on_the_disk(check, monkeypatch):
    def with_room(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(free))

    with_room(10**12)
    assert " 26 × " in check(save_steps=1)["disk"] and " 3 × " in check(save_steps=1, keep_checkpoints=2)["disk"]
    with_room(1000)
    with pytest.raises(InputError, match=r"output_dir=.*/run: .* 0.0 MiB free; expected room .*--keep_checkpoints"):
        check()


def test_a_step_that_does_not_fit_in_memory(check, monkeypatch):
    monkeypatch.setattr(module, "this_machine", lambda: Machine(0, 1, 2**20))
    with pytest.raises(InputError, match=r"batch_size=4: .* at the peak, 1.0 MiB usable per process; expected room"):
        check()


def test_what_it_would_go_on_from(check, tmp_path):
    digest = "03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4"  # of the bytes "1234"
    for step in (3, 6):
        folder = tmp_path / f"run/checkpoints/step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "states.pt").write_bytes(b"1234" if step == 3 else b"123")
        [(_, origin)] = write_origin(folder, Origin(ranks=2, rows_per_step=8, zero_stage=3)).items()
        write_manifest(folder, {"states.pt": FileEntry(4, digest), ORIGIN_FILE: origin})
    (tmp_path / "run/checkpoints/latest").write_text("step-000006")
    (tmp_path / "run/config.yaml").write_text("{}\n")
    assert check()["output"].endswith("run: goes on from step-000003")  # the newer one is cut short
    assert "of 8 rows (4 × 2 × 1 ranks)" in check()["steps"]  # two ranks saved it
    with pytest.raises(InputError, match="--change_global_batch"):
        check(batch_size=3)
    assert check(resume="never")["output"].endswith("run: a new run")
    (tmp_path / "run/config.yaml").write_text("epochs: 5\n")
    with pytest.raises(InputError, match="--epochs 2: the checkpoint in .* was trained with 5"):
        check()


def test_the_weights_of_all_teachers_are_reckoned(check, models, monkeypatch):
    for name, hidden in (("large", 512), ("larger", 768)):
        config = Qwen2Config.from_pretrained(models / "teacher", hidden_size=hidden, intermediate_size=4 * hidden)
        AutoModelForCausalLM.from_config(config).save_pretrained(models / name)
    sizes = {n: AutoModelForCausalLM.from_pretrained(models / n).num_parameters() for n in ("large", "larger")}

    def peak(*names: str) -> float:
        found = check(teacher_name="none", teacher_names=[str(models / name) for name in names])
        expected = " + ".join(f"{sizes[name]:,}" for name in names)
        assert f", teacher{'s' if len(names) > 1 else ''} {expected} parameters" in found["models"]
        assert " MiB at the peak" in found["memory"]
        return 2**20 * float(found["memory"].split()[0])

    # Keys and values, and what the teachers' forward passes take, are there one after the other.
    more = peak("large", "larger", "large") - peak("large", "larger")
    assert more == pytest.approx(4 * sizes["large"], rel=0.05)
    usable = int(peak("large", "larger") + 2 * sizes["large"])
    monkeypatch.setattr(module, "this_machine", lambda: Machine(0, 1, usable))
    peak("large", "larger")
    with pytest.raises(InputError, match=r"batch_size=4: .* at the peak, .* expected room"):
        peak("large", "larger", "large")


def test_what_handoff_takes_is_reckoned(check):
    # Keys and values: of two source layers of 4 numbers each one layer of 4, and its bias.
    assert "map of the handoff 72, " in check(handoff_weight=1)["models"]
    assert "map of" not in check()["models"]
    with pytest.raises(InputError, match="--handoff_source_layers 3: expected 1 to 2"):
        check(handoff_weight=1, handoff_source_layers=3)
