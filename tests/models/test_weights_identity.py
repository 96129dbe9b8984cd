"""What stands for a model's weights: any bit of them is another text, another place, name or partner is not."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvds.errors import InputError
from kvds.models.weights_identity import NOT_HERE, weights_identity
from tests.harness.hub_cache import hub_copy
from tests.harness.survival_runs import make_models


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


def of_hub(name: str, *, fetch: bool) -> str:
    return weights_identity(name, init="pretrained", seed=0, flag="--teacher_name", fetch=fetch)


def weights(folder: Path) -> str:
    return of_hub(str(folder), fetch=False)


@settings(max_examples=60)
@given(data=st.data())
def test_any_bit_of_any_shard_is_another_model(models, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("sharded")
    shards = data.draw(st.integers(1, 3))
    model = AutoModelForCausalLM.from_pretrained(models / "teacher")
    model.save_pretrained(folder, max_shard_size="100GB" if shards == 1 else f"{24 // shards}KB")
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) == 1) == (shards == 1)
    before = weights(folder)
    (folder / "README.md").write_text("of another day")
    (folder / "training_args.bin").write_bytes(b"no weights")
    shutil.copytree(folder, folder / "moved")
    (folder / "moved/consolidated.safetensors").write_bytes(b"a second copy")
    assert weights(folder / "moved") == weights(folder) == before
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    assert weights(folder) != before


def test_the_middle_of_a_large_file_counts(tmp_path):
    tensors = {f"layer{n}": torch.full((2**18,), float(n)) for n in range(8)}  # 8 MiB
    save_file(tensors, tmp_path / "model.safetensors")
    before = weights(tmp_path)
    tensors["layer4"][17] += 1e-3
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights(tmp_path) != before


def test_what_is_loaded_counts_and_what_lies_beside_it_does_not(models, tmp_path):
    shutil.copytree(models / "teacher", tmp_path / "a")
    before = weights(tmp_path / "a")
    other = {name: tensor + 1 for name, tensor in load_file(tmp_path / "a/model.safetensors").items()}
    save_file(other, tmp_path / "a/other", {"format": "pt"})
    (tmp_path / "a/pytorch_model.bin").write_bytes(b"an older form")
    assert weights(tmp_path / "a") == before
    (tmp_path / "a/model.safetensors").rename(tmp_path / "a/kept")  # names change places: another model is loaded
    (tmp_path / "a/other").rename(tmp_path / "a/model.safetensors")
    assert weights(tmp_path / "a") != before


def test_weights_that_are_drawn_and_weights_that_are_nowhere(tmp_path):
    assert weights_identity("x", init="random", seed=3, flag="--student_name") == "random, seed 3"
    assert weights(tmp_path) == NOT_HERE
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert weights(tmp_path) == NOT_HERE  # the loader says what is wrong with it
    assert of_hub("nobody/nothing", fetch=False) == NOT_HERE
    with pytest.raises(InputError, match="--teacher_name=nobody/nothing: the model with weights could not be loaded"):
        of_hub("nobody/nothing", fetch=True)


def test_a_hub_name_and_its_folder_are_one_model(models, tmp_path, monkeypatch):
    name = hub_copy(models / "teacher", tmp_path, "some/teacher", monkeypatch)
    assert of_hub(name, fetch=False) == of_hub(name, fetch=True) == weights(models / "teacher")
    assert weights(models / "student") != weights(models / "teacher")
