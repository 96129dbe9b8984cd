"""Shapes read off configurations, and captured tensors compared with them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma4TextConfig

from kvds.errors import InputError
from kvds.kv import KVShape, KVStates

PLAIN = {"model_type": "qwen2", "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 24}


def test_shape_falls_back_to_query_heads_and_hidden_size() -> None:
    assert KVShape.from_config(SimpleNamespace(**PLAIN)) == KVShape(3, 4, 6, 4)
    own = SimpleNamespace(**PLAIN, num_key_value_heads=2, head_dim=10)
    assert KVShape.from_config(own) == KVShape(3, 2, 10, 4)


@pytest.mark.parametrize(("name", "values"), [("head_dim", [6, 8, 6]), ("num_key_value_heads", (2, 2, 1))])
def test_layers_that_differ_are_an_input_error(name: str, values: object) -> None:
    with pytest.raises(InputError, match=f"{name}=.*the same number in every layer"):
        KVShape.from_config(SimpleNamespace(**PLAIN, **{name: values}))


def test_layers_that_differ_by_kind_are_an_input_error_and_can_be_estimated() -> None:
    kinds = ["sliding_attention", "full_attention"]
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma4TextConfig(**sizes, head_dim=8, global_head_dim=16, layer_types=kinds * 2, num_kv_shared_layers=0)
    with pytest.raises(InputError, match=r"head_dim=\[8, 16, 8, 16\]: .*in every layer \(or --alignment_mode none"):
        KVShape.from_config(config)
    assert KVShape.estimated(config) == KVShape(4, 2, 16, 4, 32)
    alike = Gemma4TextConfig(**sizes, head_dim=8, global_head_dim=8, layer_types=kinds * 2, num_kv_shared_layers=0)
    assert KVShape.from_config(alike) == KVShape(4, 2, 8, 4, 32)


def test_equal_numbers_per_layer_are_one_number() -> None:
    config = SimpleNamespace(**PLAIN, num_key_value_heads=[2, 2, 2], layer_types=["full_attention"] * 3)
    assert KVShape.from_config(config) == KVShape(3, 2, 6, 4)


def test_what_is_no_decoder_names_some() -> None:
    with pytest.raises(InputError, match="model_type=t5: its configuration has no num_hidden_layers.*gemma, gemma2, "):
        KVShape.from_config(SimpleNamespace(model_type="t5"))


def test_layers_without_keys_and_values_are_an_input_error() -> None:
    with pytest.raises(InputError, match="layer_types=linear_attention: expected full_attention or sliding_attention"):
        KVShape.from_config(SimpleNamespace(**PLAIN, layer_types=["linear_attention", "full_attention"]))


def layers(*heads: int, dim: int = 6) -> tuple[torch.Tensor, ...]:
    return tuple(torch.ones(2, count, 5, dim, requires_grad=True) for count in heads)


def test_check_looks_at_every_layer_of_both_parts() -> None:
    shape = KVShape(3, 2, 6, 4)
    KVStates(layers(2, 2, 2), layers(2, 2, 2)).check(shape, side="student")
    for states, found in (
        (KVStates(layers(2, 2, 2), layers(2, 2, 1)), "3 layers × 1 KV heads × 6"),
        (KVStates(layers(2, 2, 2, dim=8), layers(2, 2, 2)), "3 layers × 2 KV heads × 8"),
        (KVStates(layers(2, 2, 2), layers(2, 2)), "2 layers × 2 KV heads × 6"),
    ):
        with pytest.raises(InputError, match=f"teacher: its first batch has {found} .*expected 3 × 2 × 6"):
            states.check(shape, side="teacher")


def test_detach_shares_memory_and_has_no_graph() -> None:
    states = KVStates(layers(2), layers(2))
    bare = states.detach()
    for part, own in zip(bare, states, strict=True):
        assert not part[0].requires_grad and own[0].requires_grad
        assert part[0].data_ptr() == own[0].data_ptr()
