"""Models from a folder, a hub name or a configuration: overrides, checks before loading, and damaged folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Qwen2Config, T5Config

from kvds.config import RunConfig
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.errors import InputError
from kvds.kv import KVShape
from kvds.kv.families import backbone
from kvds.models.architecture import check_positions, load_config
from kvds.models.family_check import check_family
from kvds.models.loading import load_model
from kvds.models.tokenizer import check_same_tokenizer, check_vocabulary, load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``qwen2/`` with weights and tokenizer, ``gpt2/`` and ``t5/`` with a config.json alone, ``empty/``."""
    folder = tmp_path_factory.mktemp("models")
    train_problem_tokenizer(folder / "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen2")
    config = Qwen2Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "qwen2")
    GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=16, n_head=2, n_positions=64).save_pretrained(
        folder / "gpt2"
    )
    T5Config().save_pretrained(folder / "t5")
    (folder / "empty").mkdir()
    return folder


def load(name: Path | str, overrides: str = "", *, init: str = "pretrained", seed: int = 0):
    config = load_config(str(name), overrides, flag="student")
    return load_model(
        str(name), config, init=init, dtype=torch.float32, attn_implementation="sdpa", seed=seed, flag="student"
    )


def error_of(call, *args: object, **kwargs: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_overrides_are_typed_and_derived_values_follow(folder):
    name = str(folder / "qwen2")
    config = load_config(name, "num_hidden_layers=5, rms_norm_eps=1e-3,tie_word_embeddings=false", flag="student")
    assert (config.num_hidden_layers, config.rms_norm_eps, config.tie_word_embeddings) == (5, 1e-3, False)
    assert config.layer_types == ["full_attention"] * 5  # 2 in the file
    assert load_config(name, "rms_norm_eps=1", flag="student").rms_norm_eps == 1
    assert load_config(name, flag="student").num_hidden_layers == 2  # nothing of the above stays
    wide = KVShape.from_config(load_config(name, "hidden_size=32,num_attention_heads=2", flag="student"))
    assert wide.head_dim == 16


def test_a_setting_may_be_called_as_its_family_calls_it_or_by_the_common_name(folder):
    own = load_config(str(folder / "gpt2"), "n_layer=4,n_embd=128,n_head=4", flag="teacher")
    common = load_config(
        str(folder / "gpt2"), "num_hidden_layers=4,hidden_size=128,num_attention_heads=4", flag="teacher"
    )
    assert own.to_dict() == common.to_dict()
    assert (own.n_layer, own.n_embd, KVShape.from_config(own).head_dim) == (4, 128, 32)


def test_rope_theta_as_config_json_calls_it_reaches_the_model(folder):
    config = load_config(str(folder / "qwen2"), "rope_theta=100.0", flag="student")
    assert config.rope_parameters["rope_theta"] == 100.0 and config.rope_parameters["rope_type"] == "default"
    model = load(folder / "qwen2", "rope_theta=100.0", init="random")
    assert backbone(model).rotary_emb.inv_freq[1].item() == pytest.approx(100.0**-0.5)


BAD_OVERRIDES = {
    "layers=3": ("layers=3", "qwen2 has no such setting", "config.json keys"),
    "to_dict=3": ("to_dict=3", "no such setting"),
    "model_type=gpt2": ("model_type=gpt2", "another --student_name"),
    "num_hidden_layers=4.0": ("num_hidden_layers=4.0", "expected int", "got float"),
    "num_hidden_layers=four": ("num_hidden_layers=four", "expected int", "got str"),
    "num_hidden_layers=true": ("num_hidden_layers=True", "expected int", "got bool"),
    "num_hidden_layers=0": ("num_hidden_layers=0", "at least 1"),
    "num_attention_heads=-2": ("num_attention_heads=-2", "at least 1"),
    "vocab_size=-5": ("vocab_size=-5", "at least 1"),
    "tie_word_embeddings=1": ("tie_word_embeddings=1", "expected bool", "got int"),
    "layer_types=3": ("layer_types=3", "expected list", "got int"),
    "num_key_value_heads=3": ("num_key_value_heads=3", "4 attention heads over 3 key-value heads"),
    "hidden_size=18": ("hidden_size=18", "18 over 4 heads", "a multiple"),
    "hidden_size=12": ("hidden_size=12", "3 numbers per head", "even"),
}


@pytest.mark.parametrize("overrides", BAD_OVERRIDES)
def test_bad_overrides_are_explained(folder, overrides):
    message = error_of(load_config, str(folder / "qwen2"), overrides, flag="student")
    assert message.startswith("--student_config_overrides ")
    for part in ("expected", *BAD_OVERRIDES[overrides]):
        assert part in message, message


def test_a_configuration_that_no_model_can_be_built_from(folder):
    message = error_of(load, folder / "qwen2", "hidden_act=nothing", init="random")
    assert message.startswith(f"--student_name={folder / 'qwen2'}: no model can be built") and "nothing" in message


def test_unknown_family(folder):
    config = load_config(str(folder / "t5"), flag="teacher")
    message = error_of(lambda: check_family(config, "--teacher_name=t5"))
    assert message.startswith("--teacher_name=t5: model_type=t5: a small model of its configuration cannot be run")
    assert "expected one of gemma, " in message and ", llama, mistral, " in message


def test_vocabulary_may_be_padded_but_not_too_small(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen2")
    largest = max(tokenizer.get_vocab().values())
    for rows in (largest + 1, largest + 100):
        check_vocabulary(Qwen2Config(vocab_size=rows), tokenizer, flag="student")
    message = error_of(check_vocabulary, Qwen2Config(vocab_size=largest), tokenizer, flag="student")
    assert f"--student_name: vocab_size {largest} has no row for token id {largest}" in message
    assert f"--student_config_overrides vocab_size={largest + 1} with --student_init random" in message


def test_rows_longer_than_the_models_positions(folder):
    config = load_config(str(folder / "gpt2"), flag="teacher")
    check_positions(config, 64, flag="teacher")
    message = error_of(check_positions, config, 65, flag="teacher")
    assert message == "max_length=65: the teacher has 64 positions; expected --max_length 64 or less"


def run_config(**values: object) -> RunConfig:
    return RunConfig(output_dir="unused", **{k: str(v) if isinstance(v, Path) else v for k, v in values.items()})


def test_the_tokenizer_is_the_named_one_else_the_teachers_else_the_students(folder, tmp_path):
    train_problem_tokenizer(tmp_path / "named")
    other = AutoTokenizer.from_pretrained(tmp_path / "named")
    other.add_tokens(["<extra>"])
    other.save_pretrained(tmp_path / "named")
    qwen2, gpt2 = folder / "qwen2", folder / "gpt2"
    named = load_tokenizer(run_config(teacher_name=qwen2, student_name=qwen2, tokenizer_name=tmp_path / "named"))
    assert "<extra>" in named.get_vocab()
    for teacher, student in ((qwen2, gpt2), (gpt2, qwen2), (qwen2, qwen2)):
        found = load_tokenizer(run_config(teacher_name=teacher, student_name=student))
        assert found.get_vocab() == AutoTokenizer.from_pretrained(qwen2).get_vocab()
    # Without a teacher to learn from, its folder is not looked at.
    alone = run_config(teacher_name=tmp_path / "named", student_name=qwen2, alignment_mode="none")
    assert "<extra>" not in load_tokenizer(alone).get_vocab()


def test_no_tokenizer_anywhere(folder):
    message = error_of(load_tokenizer, run_config(teacher_name=folder / "empty", student_name=folder / "empty"))
    assert str(folder / "empty") in message and "expected --tokenizer_name FOLDER" in message


def test_different_tokenizers_are_refused(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen2")
    shutil.copytree(folder / "qwen2", tmp_path / "other")
    other = AutoTokenizer.from_pretrained(tmp_path / "other")
    other.add_tokens(["<extra>"])
    other.save_pretrained(tmp_path / "other")
    cfg = run_config(teacher_name=folder / "qwen2", student_name=tmp_path / "other")
    message = error_of(check_same_tokenizer, cfg, tokenizer)
    assert message.startswith(f"--student_name={tmp_path / 'other'}: its tokenizer ({len(tokenizer) + 1} entries)")
    assert f"the run's ({len(tokenizer)} entries)" in message and "one vocabulary" in message
    check_same_tokenizer(run_config(teacher_name=folder / "qwen2", student_name=folder / "gpt2"), tokenizer)
    unused = run_config(teacher_name=tmp_path / "other", student_name=folder / "qwen2", alignment_mode="none")
    check_same_tokenizer(unused, tokenizer)


def test_random_weights_are_a_function_of_the_seed(folder):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = load(folder / "gpt2", init="random", seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    second = load(folder / "gpt2", init="random", seed=5).state_dict()
    third = load(folder / "gpt2", init="random", seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], third["transformer.wte.weight"])


def test_pretrained_weights_in_the_dtype_asked_for(folder):
    saved = load_file(folder / "qwen2/model.safetensors")
    model = load(folder / "qwen2")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())
    config = load_config(str(folder / "qwen2"), flag="student")
    half = load_model(
        str(folder / "qwen2"), config, init="pretrained", dtype=torch.bfloat16, attn_implementation="eager", seed=0,
        flag="student",
    )  # fmt: skip
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.config._attn_implementation == "eager"


def damage(folder: Path, target: Path, kind: str) -> None:
    shutil.copytree(folder / "qwen2", target)
    weights = target / "model.safetensors"
    if kind == "no weights":
        weights.unlink()
    elif kind == "one missing":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "cut off":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif kind == "no safetensors":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    elif kind == "other shapes":
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("no weights", ("no loadable model with weights", "model.safetensors", "save_pretrained")),
        ("one missing", ("1 weights are missing (first: model.layers.1.mlp.up_proj.weight)", "--student_init random")),
        ("cut off", ("no loadable model with weights", "header", "save_pretrained")),
        ("no safetensors", ("no loadable model with weights", "header", "save_pretrained")),
        ("other shapes", ("do not have the shapes of its configuration", "--student_init random")),
    ],
)
def test_damaged_weights(folder, tmp_path, kind, parts):
    damage(folder, tmp_path / "model", kind)
    message = error_of(load, tmp_path / "model")
    assert message.startswith(f"--student_name={tmp_path / 'model'}: ")
    for part in ("expected", *parts):
        assert part in message, message
    load(tmp_path / "model", init="random")  # the configuration alone serves


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        "3",
        "{}",
        '{"model_type": "martian"}',
        b"\xff\xfe",
        '{"model_type": "qwen2", "hidden_size": "x"}',
    ],
)
def test_damaged_configurations(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)
    message = error_of(load_config, str(tmp_path), flag="teacher")
    assert message.startswith(f"--teacher_name={tmp_path}: the folder holds no loadable config.json (")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_damaged_tokenizers(folder, tmp_path, content):
    shutil.copytree(folder / "qwen2", tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text(content)
    message = error_of(load_tokenizer, run_config(student_name=folder / "qwen2", teacher_name=folder / "qwen2",
                                                  tokenizer_name=tmp_path / "model"))  # fmt: skip
    assert message.startswith(f"--tokenizer_name={tmp_path / 'model'}: the folder holds no loadable tokenizer (")


@pytest.mark.parametrize("name", ["gpt2", "nobody/nothing", "no such name!", "x" * 5000])
def test_a_hub_name_without_a_network_says_what_to_do(name):
    message = error_of(load_config, name, flag="teacher")
    assert message.startswith("--teacher_name=") and "could not be loaded from the hub" in message
    assert "without internet" in message and "--local-dir FOLDER" in message


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere", "./" + "x" * 5000])
def test_a_folder_that_is_not_there(name):
    message = error_of(load_config, name, flag="teacher")
    assert "no such folder" in message and "config.json" in message


def test_a_file_is_no_folder_and_an_empty_folder_no_model(folder, tmp_path):
    (tmp_path / "file").touch()
    assert "no such folder" in error_of(load_config, str(tmp_path / "file"), flag="teacher")
    message = error_of(load_config, str(folder / "empty"), flag="teacher")
    assert "no loadable config.json" in message and "save_pretrained" in message
