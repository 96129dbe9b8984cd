"""``kvds prune`` as a user calls it: a student that loads, the order it found, and other sizes from that order."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from kvds.cli import main
from kvds.data.tokenizer import train_problem_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    train_problem_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)), hidden_size=16, intermediate_size=24,
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def prune(model, output, *flags):
    return main(["prune", "--model_name", str(model), "--output", str(output), "--rows", "6", *flags])


def test_greedily_and_other_sizes_from_the_order_found(model, tmp_path, capfd, monkeypatch):
    assert prune(model, tmp_path / "two", "--layers", "2") == 0
    printed = capfd.readouterr().out
    order = json.loads((tmp_path / "two/pruning.json").read_text())
    gone = [layer for layer, _ in order["removed"]]
    assert len(gone) == 2 and order["kept"] == [n for n in range(4) if n not in gone]
    assert f"layers kept: {','.join(map(str, order['kept']))} (2 of 4)" in printed and "cross entropy" in printed
    assert order["cross_entropy"] > 0 and order["rows"] == 6 and order["num_hidden_layers"] == 4
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert student.config.num_hidden_layers == 2 and AutoTokenizer.from_pretrained(tmp_path / "two").eos_token
    assert [path.name for path in tmp_path.iterdir()] == ["two"]

    # Three layers: the order says which, no row is read.
    monkeypatch.setattr("kvds.data.mixture.load_mixture", None)
    assert prune(model, tmp_path / "three", "--layers", "3", "--order", str(tmp_path / "two/pruning.json")) == 0
    assert json.loads((tmp_path / "three/pruning.json").read_text())["kept"] == [n for n in range(4) if n != gone[0]]
    monkeypatch.undo()

    # One layer: the order goes on where it ended.
    assert prune(model, tmp_path / "one", "--layers", "1", "--order", str(tmp_path / "two/pruning.json")) == 0
    longer = json.loads((tmp_path / "one/pruning.json").read_text())["removed"]
    assert longer[:2] == order["removed"] and len(longer) == 3


def test_by_hand(model, tmp_path):
    assert prune(model, tmp_path / "hand", "--keep", "0,3") == 0
    whole, student = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "hand"))
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, whole.model.layers[3].mlp.up_proj.weight)


def test_a_search_that_was_cut_off_goes_on(model, tmp_path, monkeypatch):
    import kvds.evaluation.layer_order as module

    search = module.removal_order

    def cut(*arguments, **how):
        yield next(iter(search(*arguments, **how)))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "removal_order", cut)
    assert prune(model, tmp_path / "two", "--layers", "2") == 130
    monkeypatch.undo()
    assert not (tmp_path / "two").exists()
    assert prune(model, tmp_path / "two", "--layers", "2", "--order", str(tmp_path / "two.pruning.json")) == 0
    assert prune(model, tmp_path / "straight", "--layers", "2") == 0
    assert (tmp_path / "two/pruning.json").read_text() == (tmp_path / "straight/pruning.json").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "4"], "--layers 4: the model has 4; expected 1 to 3"),
        (["--layers", "0"], "--layers 0: the model has 4; expected 1 to 3"),
        (["--keep", "0,7"], "--keep 0,7: expected layers of 0 to 3, each once, in ascending order"),
        (["--keep", "a"], "--keep a: expected numbers of layers with commas between, such as 0,1,8"),
        (["--keep", "0", "--order", "x.json"], "--order: says which layers leave first; expected --layers N"),
        (["--layers", "2", "--order", "x.json"], "--order x.json: cannot be read"),
        (["--layers", "2", "--max_length", "2"], "--max_length 2: every calibration row is longer"),
        (["--layers", "2", "--batch_size", "0"], "--batch_size 0: expected at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_leaves_nothing(model, tmp_path, capfd, flags, message):
    assert prune(model, tmp_path / "student", *flags) == 2
    assert message in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_order_of_another_model(model, tmp_path, capfd):
    (tmp_path / "order.json").write_text('{"num_hidden_layers": 30, "removed": [[29, 2.0]]}')
    assert prune(model, tmp_path / "student", "--layers", "2", "--order", str(tmp_path / "order.json")) == 2
    assert "is of a model of 30 layers, this one has 4" in capfd.readouterr().err
    order = {"num_hidden_layers": 4, "removed": [[3, 2.0], [1, 3.0]], "weights": "9 bytes of another"}
    (tmp_path / "order.json").write_text(json.dumps(order))
    assert prune(model, tmp_path / "student", "--layers", "2", "--order", str(tmp_path / "order.json")) == 2
    assert "is of a model with other weights (9 bytes of another, here " in capfd.readouterr().err
    assert not (tmp_path / "student").exists()


def test_a_folder_that_is_there_stays(model, tmp_path, capfd):
    assert prune(model, model, "--layers", "2") == 2
    assert "is there already; expected the name of a new folder" in capfd.readouterr().err
