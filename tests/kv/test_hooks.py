"""The life of a capture: nesting, re-entry, recomputation, other people's hooks, failures."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, MistralConfig, Qwen2Config, Qwen3Config

from kvds.errors import InputError
from kvds.kv import KVCapture, KVStates

TOKENS = 7
COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=10),
    "gpt2": GPT2Config(vocab_size=61, n_embd=24, n_layer=3, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2),
}


def make_model(config: Any) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config).eval()


def ids(seed: int = 5) -> Tensor:
    return torch.randint(3, 61, (2, TOKENS), generator=torch.Generator().manual_seed(seed))


def capture_of(model: nn.Module, seed: int, **kwargs: Any) -> KVStates:
    with torch.no_grad(), KVCapture(model, **kwargs) as capture:
        model(input_ids=ids(seed), use_cache=False)
    return capture.states


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_equal(found: KVStates, expected: KVStates) -> None:
    assert len(found.keys) == len(expected.keys) and len(found.values) == len(expected.values)
    for one, other in zip([*found.keys, *found.values], [*expected.keys, *expected.values], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", CONFIGS)
def test_capture_adds_no_forward(family: str) -> None:
    model = make_model(CONFIGS[family])
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    with torch.no_grad():
        model(input_ids=ids(), use_cache=False)
        plain = calls.copy()
        calls.clear()
        with KVCapture(model, rope="post"):
            model(input_ids=ids(), use_cache=False)
    assert calls == plain
    assert set(calls.values()) == {1}


@pytest.mark.parametrize(
    ("family", "key_strides"),
    [
        ("qwen2", (TOKENS * 2 * 6, 6, 2 * 6, 1)),
        ("qwen3", (TOKENS * 2 * 10, 10, 2 * 10, 1)),
        ("gpt2", (TOKENS * 3 * 24, 6, 3 * 24, 1)),
    ],
)
def test_captured_tensors_are_views(family: str, key_strides: tuple[int, ...]) -> None:
    model = make_model(CONFIGS[family])
    with torch.no_grad(), KVCapture(model) as capture:
        model(input_ids=ids(), use_cache=False)
    for states, outputs in ((capture.states.keys, capture.key_outputs), (capture.states.values, capture.value_outputs)):
        for tensor, (output, heads) in zip(states, outputs, strict=True):
            assert tensor.stride() == key_strides
            assert tensor.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
            assert torch.equal(tensor, heads(output))


def test_captures_nest() -> None:
    model = make_model(CONFIGS["qwen2"])
    before, after = capture_of(model, 5), capture_of(model, 5, rope="post")
    with torch.no_grad(), KVCapture(model) as outer:
        with KVCapture(model.model, rope="post") as inner:
            model(input_ids=ids(), use_cache=False)
        assert hook_count(model) > 0  # leaving the inner one has not closed the outer one
        assert_equal(outer.states, before)
    assert_equal(inner.states, after)
    assert_equal(outer.states, before)
    assert hook_count(model) == 0


def test_capture_can_be_entered_again_and_keeps_nothing_old() -> None:
    model = make_model(CONFIGS["qwen2"])
    capture = KVCapture(model, rope="post")
    kept = []
    for seed in (5, 6):
        with torch.no_grad(), capture:
            model(input_ids=ids(seed), use_cache=False)
        kept.append(capture.states)
    assert_equal(kept[0], capture_of(model, 5, rope="post"))
    assert_equal(kept[1], capture_of(model, 6, rope="post"))
    with pytest.raises(RuntimeError, match=r"layers \[0, 1, 2\]"), capture:
        pass
    with pytest.raises(RuntimeError, match="no forward ran"):
        _ = capture.states


def test_open_capture_refuses_a_second_entry_and_stays_whole() -> None:
    model = make_model(CONFIGS["qwen2"])
    with torch.no_grad(), KVCapture(model) as capture:
        hooks = hook_count(model)
        with pytest.raises(RuntimeError, match="already open"), capture:
            pass
        assert hook_count(model) == hooks
        model(input_ids=ids(), use_cache=False)
    assert_equal(capture.states, capture_of(model, 5))


def test_last_forward_counts() -> None:
    model = make_model(CONFIGS["qwen2"])
    with torch.no_grad(), KVCapture(model, rope="post") as capture:
        for seed in (5, 6):
            model(input_ids=ids(seed), use_cache=False)
            assert_equal(capture.states, capture_of(model, seed, rope="post"))
    assert_equal(capture.states, capture_of(model, 6, rope="post"))


@pytest.mark.parametrize("read_first", [True, False])
@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", CONFIGS)
def test_recomputation_inside_the_context_disturbs_nothing(family: str, rope: str, read_first: bool) -> None:
    """Task loss sent back while the hooks are still there; the KV loss follows on the graph of the first forward."""
    gradients = []
    for checkpointing in (False, True):
        model = make_model(CONFIGS[family])
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        outputs: list[Tensor] = []
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        projection = model.transformer.h[0].attn.c_attn if family == "gpt2" else model.model.layers[0].self_attn.v_proj
        projection.register_forward_hook(lambda _module, _args, output, outputs=outputs: outputs.append(output))
        with KVCapture(model, rope=rope, require_grad=True) as capture:
            logits = model(input_ids=ids(), use_cache=False).logits
            if read_first:
                first = capture.states
            logits.square().mean().backward(retain_graph=True)
            assert len(outputs) == 1 + checkpointing  # the recomputation did pass the hooks
            if read_first:
                assert capture.states is first
        assert capture.value_outputs[0][0] is outputs[0]
        loss = sum((t * torch.linspace(0.5, 2.0, t.numel()).view_as(t)).sin().sum() for t in sum(capture.states, ()))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


class CountedIdentity(torch.autograd.Function):
    """What ZeRO-3 wraps a module's output in, to fetch its weights before the backward pass."""

    backwards = 0

    @staticmethod
    def forward(_ctx: Any, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        CountedIdentity.backwards += 1
        return gradient


def test_hooks_of_others_come_first_and_stay() -> None:
    model = make_model(CONFIGS["qwen2"])
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.register_forward_hook(lambda _module, _args, output: CountedIdentity.apply(output))
    hooks = hook_count(model)
    CountedIdentity.backwards = 0
    with KVCapture(model, require_grad=True) as capture:
        model(input_ids=ids(), use_cache=False)
    # The last layer's keys and values: nothing but this loss reaches them, so each hook's own backward runs once.
    (capture.states.keys[-1].sum() + capture.states.values[-1].sum()).backward(
        inputs=[model.model.layers[-1].self_attn.k_proj.weight, model.model.layers[-1].self_attn.v_proj.weight]
    )
    assert CountedIdentity.backwards == 2
    assert hook_count(model) == hooks


def test_chosen_layers_in_the_order_asked_for() -> None:
    model = make_model(CONFIGS["qwen2"])
    every = capture_of(model, 5, rope="post")
    some = capture_of(model, 5, rope="post", layers=[2, 0])
    assert_equal(some, KVStates((every.keys[2], every.keys[0]), (every.values[2], every.values[0])))
    with pytest.raises(InputError, match=r"layers=\[3, -1\]: expected numbers from 0 to 2"):
        KVCapture(model, layers=[3, 0, -1])


def test_exception_in_the_middle_of_a_forward_leaves_neither_hooks_nor_states() -> None:
    model = make_model(CONFIGS["qwen2"])

    def fail(*_: Any) -> None:
        raise OSError("on purpose")

    capture = KVCapture(model, rope="post")
    with torch.no_grad(), capture:
        model(input_ids=ids(), use_cache=False)
    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(OSError, match="on purpose"), capture:
        model(input_ids=ids(), use_cache=False)
    handle.remove()
    assert hook_count(model) == 0
    with pytest.raises(RuntimeError, match="no forward ran"):
        _ = capture.states


def test_skipped_layer_is_named() -> None:
    model = make_model(CONFIGS["qwen2"])
    with pytest.raises(RuntimeError, match=r"attention layers \[2\]"), torch.no_grad(), KVCapture(model):
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
        model(input_ids=ids(), use_cache=False)


def test_frozen_projection_is_a_detached_capture() -> None:
    model = make_model(CONFIGS["qwen2"])
    model.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)  # trains layers above it alone
    with pytest.raises(RuntimeError, match=r"keys of layer 0 .*frozen"), KVCapture(model, require_grad=True):
        model(input_ids=ids(), use_cache=False)
    assert hook_count(model) == 0


def test_layer_with_other_heads_is_an_input_error() -> None:
    model = make_model(CONFIGS["qwen2"])
    attention = model.model.layers[1].self_attn
    attention.k_proj, attention.v_proj = nn.Linear(24, 24), nn.Linear(24, 24)  # 4 KV heads instead of 2
    attention.num_key_value_groups = 1
    with pytest.raises(InputError, match=r"attention layer 1: its keys are \(4, 6\) per token; expected 2 KV heads"):
        capture_of(model, 5)
    assert hook_count(model) == 0


def test_layers_of_both_kinds_are_captured_whole() -> None:
    config = Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    model = make_model(config)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids(), use_cache=True, past_key_values=cache)
    assert len(set(config.layer_types)) == 2
    states = capture_of(model, 5, rope="post")
    for layer, key, value in zip(cache.layers, states.keys, states.values, strict=True):
        torch.testing.assert_close(key, layer.keys, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value, layer.values, rtol=1e-5, atol=1e-6)


def test_uniform_sliding_window_is_captured_whole() -> None:
    model = make_model(MistralConfig(**COMMON, sliding_window=4))
    with torch.no_grad():
        cache = model(input_ids=ids(), use_cache=True).past_key_values
    states = capture_of(model, 5, rope="post")
    for layer, key, value in zip(cache.layers, states.keys, states.values, strict=True):
        kept = layer.keys.shape[2]
        assert kept < TOKENS == key.shape[2]  # the cache forgets what its window has passed
        torch.testing.assert_close(key[:, :, -kept:], layer.keys, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value[:, :, -kept:], layer.values, rtol=1e-5, atol=1e-6)
