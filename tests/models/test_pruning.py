"""A pruned model computes what the whole one computes without the layers that left, and is a model like any other."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from kvds.errors import InputError
from kvds.kv.families import decoder_layers
from kvds.models.pruning import prune_layers

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "qwen2, window in the upper layers": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=3, tie_word_embeddings=True
    ),
    "qwen3": Qwen3Config(**SIZES),
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    "gpt2": GPT2Config(vocab_size=40, n_layer=5, n_embd=16, n_head=2, n_positions=64, initializer_range=0.3),
}


def built(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("keep", [[0, 2, 4], [3], [0, 1, 2, 3, 4]], ids=str)
def test_it_computes_what_is_left(name, keep, tmp_path):
    model = built(name)
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    pruned = prune_layers(model, keep)
    for number, layer in enumerate(decoder_layers(model)):
        if number not in keep:
            layer.forward = lambda hidden_states, *_, **__: hidden_states
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert torch.equal(pruned(ids, use_cache=False).logits, expected)
        pruned.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(ids, use_cache=False).logits, expected)
        # Caches count layers by the number that each layer knows of itself.
        assert torch.allclose(loaded(ids, use_cache=True).logits, expected, atol=1e-5)
        loaded.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert loaded.config.num_hidden_layers == len(keep)


def test_the_weights_are_its_own():
    model = built("llama")
    pruned = prune_layers(model, [1, 3])
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert all(bool(parameter.any()) for parameter in model.parameters() if parameter.dim() == 2)


def test_dtype_and_generation_settings_stay():
    model = built("llama").to(torch.bfloat16)
    model.generation_config.temperature = 0.3
    pruned = prune_layers(model, [0])
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}
    assert pruned.generation_config.temperature == 0.3


@pytest.mark.parametrize("keep", [[], [5], [-1], [1, 0], [2, 2]], ids=str)
def test_layers_that_it_does_not_have(keep):
    with pytest.raises(InputError, match="expected layers of 0 to 4, each once, in ascending order"):
        prune_layers(built("llama"), keep)
