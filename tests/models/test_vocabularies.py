"""Models of two vocabularies are refused, by folder and by hub name, whatever files their tokenizers lie in."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2Tokenizer

from kvds.config.recipe import parse_run_config
from kvds.errors import InputError
from kvds.models.tokenizer import check_same_tokenizer, load_tokenizer
from tests.harness.hub_cache import hub_copy
from tests.harness.survival_runs import flags, make_models

OTHER = r"--student_name=.*qwen: its tokenizer \(\d+ entries\) differs from the run's"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """``qwen`` and ``gpt2``, each with a tokenizer of its own; ``bare`` brings none."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    shutil.copytree(folder / "student", folder / "qwen")
    shutil.copytree(folder / "tokenizer", folder / "qwen", dirs_exist_ok=True)
    shutil.copytree(folder / "student", folder / "bare")
    letters = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz0123456789?.Ġ"]
    GPT2Config(vocab_size=len(letters), n_embd=8, n_layer=1, n_head=2).save_pretrained(folder / "gpt2")
    tokenizer = GPT2Tokenizer(vocab={piece: i for i, piece in enumerate(letters)}, merges=[])
    tokenizer.save_pretrained(folder / "gpt2")
    shutil.copytree(folder / "gpt2", folder / "old_gpt2")  # as it was before there was a tokenizer.json
    for file in (folder / "old_gpt2").glob("tokenizer*"):
        file.unlink()
    (folder / "old_gpt2/vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(letters)}))
    (folder / "old_gpt2/merges.txt").write_text("#version: 0.2\n")
    return folder


def check(models: Path, teacher: object, student: object) -> None:
    argv = flags(models, models / "out", teacher_name=teacher, student_name=student)
    at = argv.index("--tokenizer_name")
    cfg = parse_run_config(argv[:at] + argv[at + 2 :])
    check_same_tokenizer(cfg, load_tokenizer(cfg))


@pytest.mark.parametrize("teacher", ["gpt2", "old_gpt2"])
def test_two_vocabularies_are_refused_as_folders(models, teacher):
    with pytest.raises(
        InputError, match=r"--student_name=.*qwen: its tokenizer \(\d+ entries\) differs from the run's"
    ):
        check(models, models / teacher, models / "qwen")


@pytest.mark.parametrize(("teacher", "student"), [("hub", "hub"), ("hub", "folder"), ("folder", "hub")])
def test_two_vocabularies_are_refused_as_hub_names(models, tmp_path, monkeypatch, teacher, student):
    names = {"gpt2": models / "gpt2", "qwen": models / "qwen"}
    for name, kind in (("gpt2", teacher), ("qwen", student)):
        if kind == "hub":
            names[name] = hub_copy(models / name, tmp_path, f"some/{name}", monkeypatch)
    with pytest.raises(
        InputError, match=r"--student_name=.*qwen: its tokenizer \(\d+ entries\) differs from the run's"
    ):
        check(models, names["gpt2"], names["qwen"])


def test_one_vocabulary_is_taken_by_either_name(models, tmp_path, monkeypatch):
    name = hub_copy(models / "qwen", tmp_path, "some/qwen", monkeypatch)
    assert AutoTokenizer.from_pretrained(name).get_vocab() == AutoTokenizer.from_pretrained(models / "qwen").get_vocab()
    check(models, name, models / "qwen")
    check(models, models / "qwen", name)


def test_a_hub_name_that_brings_no_tokenizer_is_told_of(models, tmp_path, monkeypatch, caplog):
    name = hub_copy(models / "bare", tmp_path, "some/bare", monkeypatch)
    check(models, models / "qwen", name)
    assert "--student_name=some/bare: " in caplog.text and "its vocabulary is not compared" in caplog.text
    caplog.clear()
    check(models, models / "qwen", models / "bare")
    assert caplog.text == ""
