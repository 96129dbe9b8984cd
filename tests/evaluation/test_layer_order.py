"""The greedy order equals a plain search that builds every candidate, and leaves the model as it was."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from kvds.data.encoding import encode_examples
from kvds.data.synthetic import synthetic_examples
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.evaluation.layer_order import mean_loss, removal_order
from kvds.models.pruning import prune_layers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_problem_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def built(family: str, vocab_size: int) -> torch.nn.Module:
    torch.manual_seed(3)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=vocab_size, n_layer=5, n_embd=16, n_head=2, n_positions=64, initializer_range=0.3
        )
    else:
        config = LlamaConfig(
            vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().double()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_is_the_order_of_a_plain_search(family, tokenizer):
    samples = encode_examples(synthetic_examples("train", problems=20, seed=0)[:7], tokenizer, 64).samples
    model = built(family, len(tokenizer))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    how = {"pad": tokenizer.pad_token_id, "batch_size": 3}
    found = list(removal_order(model, samples, 4, progress=False, **how))

    left, expected = list(range(5)), []
    for _ in range(4):
        loss = {n: mean_loss(prune_layers(model, [x for x in left if x != n]), samples, **how) for n in left}
        leaves = min(loss, key=loss.__getitem__)
        left.remove(leaves)
        expected.append((leaves, pytest.approx(loss[leaves], rel=1e-9)))
    assert found == expected
    # From the middle on: the same.
    assert (
        list(removal_order(model, samples, 2, removed=[n for n, _ in found[:2]], progress=False, **how)) == expected[2:]
    )
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
