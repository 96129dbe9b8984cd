"""What stands for a tokenizer and an architecture: another meaning is another text, another place or form is not."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from kvds.identity.contents import architecture_identity, differences, tokenizer_identity
from tests.harness.survival_runs import make_models


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


def read(folder: Path) -> str:
    return tokenizer_identity(AutoTokenizer.from_pretrained(folder))


def edit(value: Any, draw: random.Random) -> Any:
    """``value`` with one leaf changed."""
    if isinstance(value, dict) and value:
        key = draw.choice(sorted(value))
        return value | {key: edit(value[key], draw)}
    if isinstance(value, list) and value:
        place = draw.randrange(len(value))
        return [*value[:place], edit(value[place], draw), *value[place + 1 :]]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else "x" if value is None else f"{value}x"


def test_any_change_of_what_a_tokenizer_does_is_another_tokenizer(models, tmp_path):
    source = models / "tokenizer"
    content = json.loads((source / "tokenizer.json").read_text())
    settings_before = json.loads((source / "tokenizer_config.json").read_text())
    before, draw, seen = read(source), random.Random(0), 0
    shutil.copytree(source, tmp_path / "other name")
    other = tmp_path / "other name/tokenizer.json"
    other.write_text(json.dumps(content, indent=4, sort_keys=True))  # other bytes, the same tokenizer
    assert read(tmp_path / "other name") == before
    taken = json.loads(AutoTokenizer.from_pretrained(source).backend_tokenizer.to_str())
    for part in ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for _ in range(40 if content.get(part) else 0):
            # Of a merge's edits most leave no tokenizer: of the model, its vocabulary is edited.
            inside = {"vocab": edit(content["model"]["vocab"], draw)} if part == "model" else {}
            edited = content[part] | inside if inside else edit(content[part], draw)
            changed = content | {part: edited}
            other.write_text(json.dumps(changed))
            try:
                tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other name")
            except Exception:  # damaged: refused before anything asks what it is
                continue
            kept = json.loads(tokenizer.backend_tokenizer.to_str())
            if kept != taken:  # transformers overrides some parts with the class's own
                seen += 1
                assert tokenizer_identity(tokenizer) != before, (part, changed[part])
    assert seen >= 25
    other.write_text(json.dumps(content))
    (tmp_path / "other name/tokenizer_config.json").write_text(
        json.dumps(settings_before | {"eos_token": "<|pad|>", "pad_token": "<|pad|>"})
    )
    assert read(tmp_path / "other name") != before  # rows end in another token


def test_using_a_tokenizer_does_not_make_it_another(models):
    tokenizer = AutoTokenizer.from_pretrained(models / "tokenizer")
    before = tokenizer_identity(tokenizer)
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=1)
    assert tokenizer_identity(tokenizer) == before
    tokenizer.add_tokens(["Ann has"])
    assert tokenizer_identity(tokenizer) != before


def test_what_changes_the_computation_is_another_architecture(models, tmp_path):
    shutil.copytree(models / "teacher", tmp_path / "moved")
    content = json.loads((models / "teacher/config.json").read_text())

    def changed(**values: Any) -> str:
        (tmp_path / "moved/config.json").write_text(json.dumps(content | values))
        return architecture_identity(AutoConfig.from_pretrained(tmp_path / "moved"))

    before = architecture_identity(AutoConfig.from_pretrained(models / "teacher"))
    assert changed(transformers_version="5.0", use_cache=False) == before
    for values in ({"rms_norm_eps": 1e-5}, {"num_attention_heads": 1}, {"hidden_act": "gelu"}, {"vocab_size": 999}):
        assert changed(**values) != before


def test_differences_are_of_what_both_know():
    assert differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == {"b": ("2", "3")}
