"""Each tensor of a model folder is loaded, explained or refused, by every way that loads weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvds.commands.evaluate import _load
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.errors import InputError
from kvds.models.architecture import load_config
from kvds.models.hub import folder_at_hand
from kvds.models.loading import load_model
from tests.harness.model_folders import small_config, small_weights, write_model
from tests.hostile.test_fuzz_input import EXAMPLES

fuzzed = settings(
    max_examples=int(EXAMPLES or 200), derandomize=EXAMPLES is None, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
INDEX = "model.safetensors.index.json"


def load(folder: Path, overrides: str = ""):
    config = load_config(str(folder), overrides, flag="student")
    return load_model(
        str(folder), config, init="pretrained", dtype=torch.float32, attn_implementation="sdpa", seed=0, flag="student"
    )


def refused(folder: Path, overrides: str = "") -> str:
    with pytest.raises(InputError) as caught:
        load(folder, overrides)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(f"--student_name={folder}: ") and "expected" in message
    assert len(message) < 1000
    return message


def qwen2(folder: Path, *, tied: bool = True, parts: int = 1, **more: torch.Tensor) -> Path:
    return write_model(folder, small_config("qwen2", tied=tied), small_weights("qwen2", tied=tied) | more, parts=parts)


# -- faults that went unnoticed ----------------------------------------------------------------------------------------


def test_a_head_of_its_own_beside_tied_embeddings_is_refused(tmp_path):
    head = small_weights("qwen2", tied=False)["lm_head.weight"]
    message = refused(qwen2(tmp_path / "other", **{"lm_head.weight": head}))
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert '"tie_word_embeddings": false in config.json' in message
    model = load(tmp_path / "other", "tie_word_embeddings=false")  # as the message says
    assert torch.equal(model.lm_head.weight, head)
    same = small_weights("qwen2", tied=True)["model.embed_tokens.weight"]
    tied = load(qwen2(tmp_path / "same", **{"lm_head.weight": same.clone()}))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and torch.equal(tied.lm_head.weight, same)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.bias"),
        ("qwen2", "model.layers.2.self_attn.q_proj.weight"),
        ("qwen2", "model.layers.1.mlp.gate_proj.bias"),
        ("gpt2", "transformer.h.2.attn.c_attn.bias"),  # like what transformers keeps quiet about
        ("gpt2", "h.2.mlp.c_fc.weight"),
        ("qwen2", "layers.0.input_layernorm.weight"),  # stands there with its prefix, too: one would win
        ("qwen2", "score.weight"),
    ],
)
def test_a_tensor_without_a_place_is_refused(family, name, parts, tmp_path):
    tensors = small_weights(family, tied=True) | {name: torch.ones(8)}
    folder = write_model(tmp_path / "model", small_config(family, tied=True), tensors, parts=parts)
    assert "1 tensors have no place in its configuration (first: " in refused(folder)


def test_what_models_compute_is_no_weight(tmp_path):
    old = {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    bare = {name.removeprefix("transformer."): t for name, t in small_weights("gpt2", tied=True).items()}
    model = load(write_model(tmp_path / "gpt2", small_config("gpt2", tied=True), bare | old))
    assert all(torch.equal(t, model.transformer.state_dict()[name]) for name, t in bare.items())
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    load(
        write_model(
            tmp_path / "llama", small_config("llama", tied=False), small_weights("llama", tied=False) | frequencies
        )
    )


def test_an_override_may_explain_what_is_left_out(tmp_path, caplog):
    config = small_config("llama", tied=True)
    config.attention_bias = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load(tmp_path)
    assert not caplog.records
    load(tmp_path, "attention_bias=false")
    assert "an override leaves out 8 of its tensors (first: model.layers.0.self_attn.k_proj.bias)" in caplog.text


@pytest.mark.parametrize("layers", [1, 3])
def test_pretrained_weights_keep_their_layers(layers, tmp_path):
    message = refused(qwen2(tmp_path), f"num_hidden_layers={layers}")
    assert f"num_hidden_layers={layers} for pretrained weights of 2 layers" in message
    assert "use kvds prune (or --student_init random)" in message
    load(tmp_path, "num_hidden_layers=2")
    gpt2 = write_model(tmp_path / "gpt2", small_config("gpt2", tied=True), small_weights("gpt2", tied=True))
    assert "use kvds prune" in refused(gpt2, "n_layer=1")


def test_pickles_are_refused_and_beside_safetensors_left_alone(tmp_path):
    folder = qwen2(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (folder / "consolidated.safetensors").write_bytes(b"never read")
    load(folder)
    (folder / "model.safetensors").unlink()
    message = refused(folder)
    assert "only pytorch_model.bin, and weights are read as safetensors alone" in message
    assert "use_safetensors=False).save_pretrained(" in message
    torch.save(small_weights("qwen2", tied=True), folder / "pytorch_model.bin")  # a good one
    assert "only pytorch_model.bin" in refused(folder)


def test_a_file_cut_short_by_a_byte_is_told_from_its_header(tmp_path):
    folder = qwen2(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors: " in refused(folder)


def test_weights_on_the_hub_are_not_looked_for_before_they_are_loaded():
    assert folder_at_hand("some/model") is None and folder_at_hand("./nowhere") == Path("nowhere")


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("parts", [1, 2])
def test_weights_that_are_not_finite_are_refused_before_anything_is_trained(bad, parts, tmp_path):
    tensors = small_weights("qwen2", tied=True)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][-1, 3] = bad
    folder = write_model(tmp_path, small_config("qwen2", tied=True), tensors, parts=parts)
    message = refused(folder)
    assert f"{name} holds 1 numbers that are NaN or infinite; expected finite weights" in message
    assert "or --student_init random" in message
    masks = small_weights("gpt2", tied=True) | {"transformer.h.0.attn.masked_bias": torch.tensor(float("-inf"))}
    load(write_model(tmp_path / "gpt2", small_config("gpt2", tied=True), masks))  # no weight


@pytest.mark.parametrize("text", ["{", "[1]", '{"max_new_tokens": -3}', "\udcff"])
def test_a_generation_config_that_cannot_be_read_is_refused(text, tmp_path):
    folder = qwen2(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.6, "do_sample": true}')
    assert load(folder).generation_config.temperature == 0.6
    (folder / "generation_config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "generation_config.json cannot be used" in refused(folder)


def test_an_adapter_is_named(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(
        '{"base_model_name_or_path": "some/base", "peft_type": "LORA"}'
    )
    save_file({"base_model.model.x": torch.ones(1)}, tmp_path / "adapter/adapter_model.safetensors")
    message = refused(tmp_path / "adapter")
    assert "it is an adapter of some/base, not a model" in message and "merge_and_unload()" in message
    folder = qwen2(tmp_path / "model")
    shutil.copy(tmp_path / "adapter/adapter_config.json", folder)
    assert "it is an adapter of some/base" in refused(folder)


def test_quantized_weights_are_refused(tmp_path):
    tensors = small_weights("qwen2", tied=True)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    folder = write_model(tmp_path, small_config("qwen2", tied=True), tensors)
    assert "model.norm.weight is stored as I8" in refused(folder)


def part(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


def change_index(folder: Path, change) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def away(name: str):
    return lambda f: (shutil.copy(part(f), f.parent / "away.safetensors"),
                      change_index(f, lambda m: m.update({k: name for k in m if m[k] == part(f).name})))  # fmt: skip


def put(name: str, where: int):
    """One more tensor in a part, which the index does not know there."""
    return lambda f: save_file(load_file(part(f, where)) | {name: torch.ones(8)}, part(f, where), {"format": "pt"})


PARTED = {
    "a part is missing": (lambda f: part(f).unlink(), "model-00002-of-00003.safetensors is missing (1 of 3 parts)"),
    "a part too many": (lambda f: shutil.copy(part(f), f / "model-00004-of-00003.safetensors"), "is no part of"),
    "another set beside": (lambda f: shutil.copy(part(f), f / "model.safetensors"), "expected one of the two"),
    "an entry leads up": (away("../away.safetensors"), "lies in '../away.safetensors'"),
    "an entry leads away": (away("/away.safetensors"), "lies in '/away.safetensors'"),
    "an entry names a pickle": (away("pytorch_model.bin"), "lies in 'pytorch_model.bin'"),
    "an entry is no name": (lambda f: change_index(f, lambda m: m.update({"x": 3})), "lies in '3'"),
    "a tensor of no entry": (put("model.extra", 0), "holds beside them model.extra"),
    "a tensor twice": (put("model.norm.weight", 0), "model.norm.weight"),
    "an entry without a tensor": (
        lambda f: change_index(f, lambda m: m.update({"model.x": part(f).name})), "it lacks model.x"),
    "no entry": (lambda f: change_index(f, dict.clear), "there is no model.safetensors"),
    "half an index": (lambda f: (f / INDEX).write_text("{"), f"{INDEX} is damaged"),
    "an index of another kind": (lambda f: (f / INDEX).write_text("[1]"), f"{INDEX} is damaged"),
    "shards of ranks": (lambda f: shutil.copy(part(f), f / "shard-00000-model-00001-of-00001.safetensors"), "no part"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PARTED)
def test_parts_and_index_must_be_each_others(kind, tmp_path):
    folder = qwen2(tmp_path / "model", parts=3)
    load(folder)
    damage, message = PARTED[kind]
    damage(folder)
    assert message in refused(folder)


# -- the property ------------------------------------------------------------------------------------------------------


@st.composite
def folders(draw):
    """A family and what its folder holds: weights kept, left out, renamed, added, of other shapes, in parts."""
    family, tied = draw(st.sampled_from(["qwen2", "llama", "gpt2"])), draw(st.booleans())
    tensors = small_weights(family, tied=tied)
    names = sorted(tensors)
    some = st.sampled_from(names)
    for change in draw(
        st.lists(st.sampled_from(["drop", "rename", "copy", "add", "shape", "head", "bare"]), max_size=2)
    ):
        name = draw(some)
        if change == "drop":
            tensors.pop(name, None)
        elif change in ("rename", "copy") and name in tensors:
            new = draw(st.sampled_from([
                name.replace("layers.1", "layers.7").replace("h.1.", "h.7."), f"base.{name}", name.split(".", 1)[-1],
                name.removesuffix("weight") + "bias", name.replace("norm", "ln").replace("ln_", "norm_"),
            ]))  # fmt: skip
            tensors[new] = (tensors.pop if change == "rename" else tensors.get)(name).clone() + 1
        elif change == "add":
            new = draw(st.sampled_from(["score.weight", "model.layers.9.mlp.up_proj.weight", "h.3.attn.c_attn.bias"]))
            tensors[new] = torch.ones(8)
        elif change == "shape" and name in tensors:
            tensors[name] = torch.cat([tensors[name], tensors[name]])
        elif change == "head":
            tensors["lm_head.weight"] = draw(st.sampled_from([torch.ones(24, 8), small_weights(family, tied=True)[
                "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"].clone()]))  # fmt: skip
        elif change == "bare":
            tensors = {n.removeprefix("transformer.").removeprefix("model."): t for n, t in tensors.items()}
    return family, tied, tensors, draw(st.sampled_from([1, 1, 2, 3]))


@fuzzed
@given(folders())
def test_every_tensor_is_in_the_model_or_the_folder_is_refused(tmp_path_factory, drawn):
    family, tied, tensors, parts = drawn
    if len(tensors) < parts:
        return
    folder = write_model(tmp_path_factory.mktemp("any"), small_config(family, tied=tied), tensors, parts=parts)
    try:
        model = load(folder)
    except InputError as error:
        assert str(error).isprintable()
        assert not _is_whole(family, tied, tensors), error
        return
    finally:
        if not EXAMPLES:
            shutil.rmtree(folder)
    loaded, prefix = model.state_dict(), f"{model.base_model_prefix}."
    for name, tensor in tensors.items():
        home = next(n for n in (name, prefix + name) if n in loaded)
        assert torch.equal(loaded[home], tensor), name
    assert not any(p.is_meta for p in model.parameters())
    held, stored = ({n.removeprefix(prefix) for n in names} for names in (loaded, tensors))
    # One matrix under two names: a file may have it under either.
    shared = {"lm_head.weight", "wte.weight" if family == "gpt2" else "embed_tokens.weight"} if tied else set()
    assert held - shared == stored - shared and (not shared or shared & stored)
    assert not shared or torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_tied_weights_that_are_stored_as_the_head_alone_are_the_embeddings(family, tmp_path):
    tensors = small_weights(family, tied=True)
    [name] = [n for n in tensors if n.endswith(("embed_tokens.weight", "wte.weight"))]
    tensors["lm_head.weight"] = stored = tensors.pop(name)
    model = load(write_model(tmp_path, small_config(family, tied=True), tensors))
    assert torch.equal(model.get_input_embeddings().weight, stored)
    untied = write_model(tmp_path / "own", small_config(family, tied=False), tensors)
    assert "1 weights are missing" in refused(untied)


def _is_whole(family: str, tied: bool, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether nothing was changed that matters."""
    good = small_weights(family, tied=tied)
    return tensors.keys() == good.keys() and all(t.shape == good[n].shape for n, t in tensors.items())


# -- every way that loads weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["head", "surplus", "missing", "adapter", "pickle", "part"])
def test_evaluation_refuses_the_same(kind, tmp_path):
    train_problem_tokenizer(tmp_path / "tokenizer")
    folder = qwen2(tmp_path / "model", parts=3 if kind == "part" else 1)
    weights = folder / "model.safetensors"
    if kind in ("head", "surplus"):
        name = "lm_head.weight" if kind == "head" else "model.layers.5.input_layernorm.weight"
        save_file(load_file(weights) | {name: torch.ones(24, 8)}, weights, {"format": "pt"})
    elif kind == "missing":
        save_file({n: t for n, t in load_file(weights).items() if "layers.1" not in n}, weights, {"format": "pt"})
    elif kind == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif kind == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    else:
        part(folder).unlink()
    message = refused(folder).removeprefix(f"--student_name={folder}").replace(" (or --student_init random)", "")
    with pytest.raises(InputError) as caught:
        _load(folder, tmp_path / "tokenizer")
    assert str(caught.value) == f"--model={folder}{message}"
