"""The same bad input through each command that takes it: refused by all, in one line that names it."""

import json
import shutil
from pathlib import Path

import pytest

from kvds.cli import main
from kvds.config.recipe import parse_run_config
from kvds.data.mixture import check_rows
from kvds.errors import InputError
from kvds.identity.folder_owner import FolderOwner
from tests.harness.ab_plans import write_plan
from tests.hostile.bad_input_files import make_files
from tests.hostile.test_bad_input import run_flags

# Folder in place of a model → what is said of it.
MODELS = {
    "nowhere": " folder",
    "empty": "config.json",
    "config_nested": "nests too deep",
    "config_quantized": "bitsandbytes",
    "generation_broken": "generation_config.json cannot be used",
    "no_weights": "model.safetensors",
    "cut_off": "no loadable model",
    "weights_noise": "no loadable model",
    "one_missing": "1 weights are missing",
    "surplus_layer": "tensors have no place",
    "surplus_bias": "tensors have no place",
    "own_head": "lm_head.weight differs",
    "pickled": "safetensors alone",
    "two_sets": "other.safetensors is no part",
    "adapter": "adapter of some/base",
    "bare_adapter": "adapter of some/base",
    "index_leads_away": "of the folder itself",
}
TOKENIZERS = {
    "nowhere": " folder",
    "tokenizer_cut": "no loadable tokenizer",
    "model": "holds no tokenizer",
    "other_tokenizer": "vocab_size 206 has no row for token id 206",
}
# Rows → what is said of them.
ROWS = {"malformed.jsonl": "malformed.jsonl", "lossy.jsonl": "max_lossy_rows", "nowhere.jsonl": "nowhere.jsonl"}
COMMANDS = ("distill", "cache", "eval", "prune", "ab")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    make_files(folder)
    shutil.copytree(folder / "model", folder / "generation_broken")
    (folder / "generation_broken/generation_config.json").write_text('{"eos_token_id": [')
    (folder / "bare_adapter").mkdir()
    shutil.copy(folder / "adapter/adapter_config.json", folder / "bare_adapter")
    row = {"prompt": "Lee has 12 ☃?", "rationale": "☃", "answer": "12"}
    (folder / "lossy.jsonl").write_text("".join(json.dumps(row | {"prompt": f"{i} ☃?"}) + "\n" for i in range(20)))
    return folder


@pytest.fixture
def refused(folder, capsys, tmp_path, monkeypatch):
    """A function: what a command says of a model, tokenizer, rows or length that it refuses."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def no_worker(*_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr("kvds.experiment.runner.Worker", no_worker)

    def plan(changes):
        """An experiment whose first arm is in order: the second is told of before the first is run."""
        good = {"teacher_name": str(folder / "model"), "student_name": str(folder / "model")}
        good |= {"tokenizer_name": str(folder / "tokenizer"), "datasets": ["synthetic"], "max_length": 64}
        bad = {name: [value] if name == "datasets" else value for name, value in changes.items()}
        bad = {name: int(value) if name == "max_length" else value for name, value in bad.items()}
        del bad["output_dir"]
        arms = {"task": {"alignment_mode": "none"}, "flat": {"alignment_mode": "flat", "kv_weight": 1.0, **bad}}
        return write_plan(tmp_path, arms=json.dumps(arms)[1:-1], common=good)

    def run(command, *, model="model", tokenizer="tokenizer", datasets="synthetic", max_length="64", output=None):
        model, tokenizer = str(folder / model), str(folder / tokenizer)
        rows = datasets if datasets == "synthetic" else str(folder / datasets)
        output = str(output or tmp_path / "out")
        changes = {
            "teacher_name": model, "student_name": model, "tokenizer_name": tokenizer, "datasets": rows,
            "max_length": max_length, "output_dir": output,
        }  # fmt: skip
        training = run_flags("", changes)
        more = ["--datasets", rows, "--max_length", max_length, "--output", output]
        commands = {
            "cache": ["--output", output, "--", *training],
            "eval": ["--model", model, "--tokenizer", tokenizer, "--max_new_tokens", "1", "--subset_size", "2", *more],
            "prune": ["--model_name", model, "--tokenizer_name", tokenizer, "--layers", "1", "--rows", "8", *more],
            "export": ["--run", model, "--output", output],
            "ab": [str(plan(changes)), "--output", output, "--workers", "2"],
        }
        if command == "distill":
            return dry(training)
        capsys.readouterr()
        assert main([command, *commands[command]]) == 2, capsys.readouterr().err[-2000:]
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kvds: error: ")]
        return line

    def dry(training):
        from kvds.training.dry_run import dry_run

        with pytest.raises(InputError) as told:
            cfg = parse_run_config([*training, "--dry_run"])
            check_rows(cfg, cfg.seed)
            dry_run(cfg)
        return str(told.value)

    return run


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("model", MODELS)
def test_models(model, command, folder, refused):
    line = refused(command, model=model)
    assert MODELS[model] in line and str(folder / model) in line and "expected" in line


@pytest.mark.parametrize("command", ["cache", "distill"])
def test_weights_are_looked_at_before_rows_are_encoded(command, refused, monkeypatch):
    def encode(*_: object, **__: object) -> None:
        raise AssertionError("rows were encoded")

    monkeypatch.setattr("kvds.data.run_data.encode_once", encode)
    assert MODELS["one_missing"] in refused(command, model="one_missing")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_tokenizers(tokenizer, command, refused):
    assert TOKENIZERS[tokenizer] in refused(command, tokenizer=tokenizer)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows, command, folder, refused, request):
    held_out = folder / rows.replace(".", ".eval.")
    if command == "eval" and (folder / rows).is_file():  # its rows are those beside
        shutil.copy(folder / rows, held_out)
        request.addfinalizer(held_out.unlink)
    assert ROWS[rows].replace(".jsonl", "") in refused(command, datasets=rows)


@pytest.mark.parametrize("command", COMMANDS)
def test_rows_that_are_all_too_long(command, refused):
    line = refused(command, max_length="9")
    assert "max_length 9" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_more_tokens_than_the_model_has_positions(command, refused):
    assert "64 positions; expected --max_length 64 or less" in refused(command, max_length="65")


@pytest.mark.parametrize("command", [*COMMANDS, "export"])
def test_an_output_that_is_a_file(command, refused, tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(command, output=tmp_path / "file")


@pytest.mark.parametrize("command", ["cache", "eval", "export", "ab"])
def test_an_output_of_another_job(command, refused, tmp_path):
    """A dry run writes nothing, and a pruned student is a new folder."""
    owned = tmp_path / ("out/tiny" if command == "ab" else "out")  # a plan has a folder of its own
    owned.mkdir(parents=True)
    with FolderOwner(owned):
        assert "belongs to process" in refused(command)
