"""Damaged and contradictory files for the cases of ``bad_input_runs.py``, all made from one small model."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, T5Config

from kvds.checkpoint.manifest import FileEntry, write_manifest
from kvds.data.tokenizer import train_problem_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
NESTED = "[" * 100_000

# Folder → file of a good tokenizer → what stands there instead.
TOKENIZERS = {
    "tokenizer_cut": {"tokenizer.json": '{"version": '},
    "tokenizer_of_another_kind": {"tokenizer.json": '{"model": {"type": "Oracle"}}'},
    "tokenizer_nested": {"tokenizer_config.json": NESTED},
    "tokenizer_config_list": {"tokenizer_config.json": "[1]"},
    "tokenizer_ends_in_a_number": {"tokenizer_config.json": '{"eos_token": 3}'},
    "tokenizer_added": {"added_tokens.json": '{"word": "id"}'},
}
# Folder → changes of a good config.json, or its whole text.
CONFIGS: dict[str, dict[str, object] | str] = {
    "config_list": "[]",
    "config_nested": NESTED,
    "config_wide": {"hidden_size": "wide"},
    "config_negative": {"hidden_size": -16},
    "config_without_heads": {"num_attention_heads": 0},
    "config_unknown_activation": {"hidden_act": "magic"},
    "config_unknown_rope": {"rope_parameters": {"rope_type": "magic"}},
    "config_bad_padding": {"pad_token_id": 99999},
    "config_layers": {"num_hidden_layers": 3},
    "config_quantized": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
}
# Folder → the whole weight file.
WEIGHTS = {"weights_empty": b"", "weights_noise": b"\xff" * 64}
_RECORD = {"store": "fp32", "fingerprint": {}, "shards": [{"sha256": "0", "bytes": 1, "counts": [1]}]}
CACHES = {
    "cache_cut": '{"store": ',
    "cache_list": "[]",
    "cache_nested": NESTED,
    "cache_of_another_store": '{"store": "int4", "shards": [], "fingerprint": {}}',
    "cache_without_records": '{"store": "fp32", "shards": [{}], "fingerprint": {}}',
    "cache_without_shards": json.dumps(_RECORD),
    "cache_of_something": '{"store": "fp32", "shards": [], "fingerprint": {"format": "2", "tokenizer": "another"}}',
    "cache_of_before": '{"store": "fp32", "shards": [], "fingerprint": {"tokenizer": "another"}}',
}
# What a run was trained with, where it is resumed with another value.
TRAINED_WITH = {
    "lr": 0.1, "seed": 7, "optimizer": "sgd", "datasets": ["gsm8k"], "alignment_mode": "flat",
    "kv_method": "right_crop", "epochs": 9, "max_length": 32,
}  # fmt: skip


def make_files(folder: Path) -> None:
    """All of it below ``folder``."""
    _make_models(folder)
    _make_rows(folder)
    for name, files in TOKENIZERS.items():
        _copy(folder / "tokenizer", folder / name, {file: text.encode() for file, text in files.items()})
    config = json.loads((folder / "model/config.json").read_text())
    for name, change in CONFIGS.items():
        text = change if isinstance(change, str) else json.dumps({**config, **change})
        _copy(folder / "model", folder / name, {"config.json": text.encode()})
    for name, content in WEIGHTS.items():
        _copy(folder / "model", folder / name, {"model.safetensors": content})
    for name, text in CACHES.items():
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(text)
        (folder / name / "fingerprint.json").write_text("[" if name == "cache_cut" else "{}")
    _make_runs(folder)
    (folder / "plan.yaml").write_text("arms: 3\n")


def _copy(source: Path, target: Path, files: dict[str, bytes]) -> None:
    shutil.copytree(source, target)
    for name, content in files.items():
        (target / name).write_bytes(content)


def _make_models(folder: Path) -> None:
    train_problem_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    config = Qwen2Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    other = AutoTokenizer.from_pretrained(folder / "tokenizer")
    other.add_tokens(["<extra>"])
    shutil.copytree(folder / "model", folder / "other_tokenizer")
    other.save_pretrained(folder / "other_tokenizer")
    other = AutoTokenizer.from_pretrained(folder / "tokenizer")
    other.eos_token = None
    other.save_pretrained(folder / "endless")
    T5Config().save_pretrained(folder / "t5")
    (folder / "empty").mkdir()
    for name in ("no_weights", "one_missing", "cut_off"):
        shutil.copytree(folder / "model", folder / name)
    (folder / "no_weights/model.safetensors").unlink()
    weights = load_file(folder / "one_missing/model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "one_missing/model.safetensors", metadata={"format": "pt"})
    for name, more in {
        "own_head": "lm_head.weight", "surplus_layer": "model.layers.2.mlp.up_proj.weight",
        "surplus_bias": "model.layers.0.mlp.up_proj.bias",
    }.items():  # fmt: skip
        weights = load_file(folder / "model/model.safetensors")
        weights[more] = torch.ones_like(weights["model.embed_tokens.weight"])
        _copy(folder / "model", folder / name, {})
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    _copy(folder / "no_weights", folder / "pickled", {"pytorch_model.bin": b"never read"})
    _copy(folder / "model", folder / "two_sets", {"other.safetensors": b""})
    _copy(folder / "model", folder / "adapter", {"adapter_config.json": b'{"base_model_name_or_path": "some/base"}'})
    index = json.dumps({"weight_map": {"x": "../model/model.safetensors"}}).encode()
    _copy(folder / "no_weights", folder / "index_leads_away", {"model.safetensors.index.json": index})
    whole = (folder / "cut_off/model.safetensors").read_bytes()
    (folder / "cut_off/model.safetensors").write_bytes(whole[:999])


def _make_rows(folder: Path) -> None:
    row = json.dumps({"prompt": "Lee has 12 balls?", "rationale": "12", "answer": "12"})
    texts = {
        "malformed.jsonl": row + '\n{"prompt": "x"}\n',
        "broken.jsonl": row + "\n\n{'prompt': 1}\n",
        "blank.jsonl": "\n\n",
        "single.jsonl": row,
        "twice.jsonl": row + '\n{"prompt": "x", "answer": "1", "answer": "2"}\n',
        "list.json": row,
        "marked.jsonl": '{"prompt": "x", "rationale": "a #### b", "answer": "1"}',
        "held_out_is_bad.jsonl": row,
        "held_out_is_bad.eval.jsonl": "{}",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "archive.jsonl").write_bytes(b"\x1f\x8b\x08\x00" * 8)
    (folder / "utf16.jsonl").write_text(row, encoding="utf-16")
    corpora = {
        "data/svamp/SVAMP.json": '[\n{"ID": "chal-1", "Body": "b", "Question": "q"}\n]',
        "data_unnumbered/svamp/SVAMP.json": '[\n{"ID": "one"}\n]',
        "data_cut/svamp/SVAMP.json": '[\n{"ID": "chal-1",\n',
        "data/arc/ARC-Easy-Train.jsonl": '{"question": {"stem": "s", "choices": []}, "answerKey": "A"}',
        "data/strategyqa/train.json": '[{"question": "q", "facts": ["f"], "answer": "yes"}]',
        "data_unmarked/gsm8k/train.jsonl": '{"question": "q", "answer": "5"}',
    }
    for name, text in corpora.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    ds = json.loads((REPOSITORY / "ds_configs/zero3_cpu.json").read_text())
    (folder / "batch.json").write_text(json.dumps({**ds, "train_batch_size": 7}))
    (folder / "tag.json").write_text(json.dumps({**ds, "checkpoint": {"tag_validation": "PERHAPS"}}))


def _make_runs(folder: Path) -> None:
    """Output folders with one checkpoint each, of four bytes that nothing must get as far as reading."""
    (folder / "folders" / "config.yaml").mkdir(parents=True)
    names = {name: "step-000003" for name in ("strange", "unlisted", "escaping", "flipped", "damaged_settings")}
    names |= {f"trained_with_{name}": "step-000003" for name in TRAINED_WITH}
    names |= {"lost": "step-000001", "led_away": "../../x"}
    for name, latest in names.items():
        checkpoint = folder / name / "checkpoints/step-000003"
        checkpoint.mkdir(parents=True)
        (checkpoint.parent / "latest").write_text(latest)
        (checkpoint / "states.pt").write_bytes(b"1234")
        write_manifest(checkpoint, {"states.pt": FileEntry(4, "0" * 64)})
        if name != "strange":
            (folder / name / "config.yaml").write_text("lr: [" if name == "damaged_settings" else "{}\n")
    (folder / "unlisted/checkpoints/step-000003/manifest.json").unlink()
    away = {"version": 1, "files": {"../../../x": {"bytes": 4, "sha256": "0"}}}
    (folder / "escaping/checkpoints/step-000003/manifest.json").write_text(json.dumps(away))
    for name, value in TRAINED_WITH.items():
        (folder / f"trained_with_{name}/config.yaml").write_text(f"{name}: {json.dumps(value)}\n")
