"""``kvds prefetch``: what a recipe needs from the hub, brought into a folder, checked there without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from kvds.cli import main
from kvds.commands.prefetch import Item, fetch, missing, wanted_items
from kvds.config import RunConfig
from kvds.data.tokenizer import train_problem_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(tmp_path) -> Path:
    """A folder as the hub's client fills it, with one model in two files."""
    folder = tmp_path / "fetched"
    snapshot = folder / "hub/models--some--student/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    train_problem_tokenizer(snapshot)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=512, num_hidden_layers=2, hidden_size=16, intermediate_size=32,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(snapshot, max_shard_size="30KB")
    return folder


@pytest.fixture
def recipe(tmp_path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "student_name: some/student\nalignment_mode: none\ndatasets: [synthetic]\nmax_length: 64\n"
        f"deepspeed_config: {REPOSITORY / 'ds_configs/zero3_cpu.json'}\n"
    )
    return file


# -- what is wanted ----------------------------------------------------------------------------------------------------


def test_items_of_a_recipe():
    cfg = RunConfig(teacher_name="a/teacher", student_name="a/student", datasets=("gsm8k:0.5", "arc"), output_dir="x")
    items, local = wanted_items(cfg)
    assert items == [
        Item("model", "a/student"),
        Item("model", "a/teacher"),
        Item("dataset", "openai/gsm8k", "main", ("train", "test")),
        Item("dataset", "allenai/ai2_arc", "ARC-Easy", ("train", "validation")),
        Item("dataset", "allenai/ai2_arc", "ARC-Challenge", ("train", "validation")),
    ]
    assert local == []


def test_random_weights_need_a_configuration_and_folders_nothing(tmp_path):
    cfg = RunConfig(teacher_name="a/b", teacher_init="random", student_name=str(tmp_path), tokenizer_name="a/b",
                    datasets=("gsm8k", "mine.jsonl", "synthetic"), data_dir=str(tmp_path), output_dir="x")  # fmt: skip
    items, local = wanted_items(cfg)
    assert items == [Item("config", "a/b")]
    assert local == [str(tmp_path), f"{tmp_path} (gsm8k)", f"{tmp_path} (mine.jsonl)"]
    both = RunConfig(model_name="a/b", teacher_init="random", datasets=("synthetic",), output_dir="x")
    assert wanted_items(both)[0] == [Item("model", "a/b")]  # one download serves both
    unread = RunConfig(
        model_name="a/b", teacher_name="a/c", alignment_mode="none", datasets=("mine.jsonl",), output_dir="x"
    )
    assert wanted_items(unread) == ([Item("model", "a/b")], ["mine.jsonl"])


# -- fetching ----------------------------------------------------------------------------------------------------------


def test_data_sets_of_the_hub_by_any_name():
    names = ("a/b@train,test:2", "c/d/config")
    cfg = RunConfig(model_name="x/y", output_dir="o", datasets=names, alignment_mode="none")
    assert wanted_items(cfg)[0][1:] == [
        Item("dataset", "a/b", None, ("train", "test")), Item("dataset", "c/d", "config"),
    ]  # fmt: skip


def test_fetch_asks_the_hub_for_what_is_read_and_no_more(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    calls = []

    def snapshot(name, **kwargs):
        calls.append((name, tuple(kwargs["allow_patterns"])))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: calls.append((name, config, split)))
    fetch(Item("model", "a/b"))
    fetch(Item("config", "a/c"))
    fetch(Item("dataset", "d/e", "main", ("train", "test")))
    assert [call[0] for call in calls] == ["a/b", "a/c", "d/e", "d/e"]
    assert [any("safetensors" in pattern for pattern in patterns) for _, patterns in calls[:2]] == [True, False]
    assert not any("bin" in pattern or "*.py" in pattern for call in calls[:2] for pattern in call[1])  # pickles, code
    assert calls[2:] == [("d/e", "main", "train"), ("d/e", "main", "test")]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: str(tmp_path))
    (tmp_path / "config.json").touch()
    assert "there is no model.safetensors" in missing(Item("model", "a/b"))
    assert missing(Item("config", "a/b")) is None


def test_a_data_set_that_is_not_there_is_missing(monkeypatch):
    import datasets

    def absent(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    assert missing(Item("dataset", "d/e", "main", ("train",))) == "Couldn't reach the Hub"


# -- the command -------------------------------------------------------------------------------------------------------


def test_check_names_what_is_missing_and_the_command_that_brings_it(hub, recipe, capfd):
    command = ["prefetch", str(recipe), "--to", str(hub), "--check"]
    assert main(command) == 0
    out = capfd.readouterr().out
    assert "ok       model some/student" in out and f"source {hub / 'env.sh'}" in out and "KVDS_PREFETCHED=" in out

    snapshot = hub / "hub/models--some--student/snapshots/abc"
    shards = sorted(snapshot.glob("*.safetensors"))
    assert len(shards) >= 2
    shards[1].unlink()
    assert main(command) == 1
    out = capfd.readouterr().out
    assert f"MISSING  model some/student: {shards[1].name} is missing" in out
    assert f"kvds prefetch {recipe} --to {hub}" in out.splitlines()[-1]

    (snapshot.parents[1] / "refs/main").unlink()
    assert main(command) == 1
    assert "MISSING  model some/student" in capfd.readouterr().out


def test_a_run_resolves_from_the_folder_by_the_hub_s_names(hub, recipe, capfd):
    assert main(["prefetch", str(recipe), "--to", str(hub), "--check"]) == 0
    program = (
        "from kvds.models.architecture import load_config\n"
        "from kvds.models.loading import load_model\n"
        "from kvds.models.tokenizer import load_tokenizer\n"
        "import sys, torch, json\n"
        "from kvds.config.recipe import parse_run_config\n"
        "cfg = parse_run_config(['--config', sys.argv[1], '--output_dir', 'x'])\n"
        "config = load_config(cfg.student, flag='student')\n"
        "model = load_model(cfg.student, config, init='pretrained', dtype=torch.float32, attn_implementation='sdpa',"
        " seed=0, flag='student')\n"
        "print(json.dumps([len(load_tokenizer(cfg)) > 100, sum(p.numel() for p in model.parameters())]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    script = f'source {hub}/env.sh && exec "$0" -c "$1" "$2"'
    done = subprocess.run(["bash", "-c", script, sys.executable, program, str(recipe)], env=environment,
                          capture_output=True, text=True, cwd=REPOSITORY)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    tokenizer, parameters = json.loads(done.stdout.splitlines()[-1])
    assert tokenizer and parameters > 512 * 16


def test_bad_input(tmp_path, recipe, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(["prefetch", str(recipe), "--to", str(file)]) == 2
    assert "is a file; expected a folder" in capsys.readouterr().err
    assert main(["prefetch", str(tmp_path / "no.yaml"), "--to", str(tmp_path)]) == 2
