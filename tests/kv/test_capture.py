"""Captured keys and values against the model's own cache, for every supported family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as AutoModel
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
)

from kvds.errors import InputError
from kvds.kv import KVCapture, KVShape
from kvds.kv.families import backbone

VOCAB, TOKENS = 61, 7
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.67}
CONFIGS = {
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=10),
    "llama": LlamaConfig(**COMMON, head_dim=10),
    "mistral": MistralConfig(**COMMON, head_dim=10, sliding_window=None),
    "gemma": GemmaConfig(**COMMON, head_dim=10),
    "gemma2": Gemma2Config(**COMMON, head_dim=10, layer_types=MIXED, sliding_window=4, query_pre_attn_scalar=12),
    "gemma3_text": Gemma3TextConfig(
        **COMMON, head_dim=10, layer_types=MIXED, sliding_window=4, query_pre_attn_scalar=12, rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}),
    "granite": GraniteConfig(**COMMON, attention_multiplier=0.3, embedding_multiplier=3.0, residual_multiplier=0.5),
    "mixtral": MixtralConfig(**COMMON, head_dim=10, num_local_experts=3, num_experts_per_tok=2),
    "olmo2": Olmo2Config(**COMMON),
    "phi3": Phi3Config(**COMMON, resid_pdrop=0.0, embd_pdrop=0.0, rope_parameters=PARTIAL),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, head_dim=10, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16),
    "smollm3": SmolLM3Config(**COMMON, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=4,
                             layer_types=MIXED),
    "stablelm": StableLmConfig(**COMMON, qk_layernorm=True, use_qkv_bias=True, rope_parameters=PARTIAL),
    "gpt_neox": GPTNeoXConfig(
        **{name: size for name, size in COMMON.items() if name != "num_key_value_heads"}, hidden_dropout=0.0,
        attention_dropout=0.0, rope_parameters=PARTIAL),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=3, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip
FAMILIES = sorted(CONFIGS)
FUSED = ("c_attn.w", "qkv_proj.w", "query_key_value.w")
PADDINGS = {"none": (0, 0), "right": (0, 3), "left": (2, 0)}


def make_model(family: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(3)
    model = AutoModel.from_config(CONFIGS[family], **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Away from zero biases and unit norms, so that leaving one out shows.
            if "layernorm" in name or "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" not in name and "wte" not in name and "wpe" not in name:
                parameter.mul_(4)
    return model.eval()


def inputs(padding: str = "none") -> dict[str, Tensor]:
    left, right = PADDINGS[padding]
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB, (2, TOKENS + left + right), generator=generator)
    mask = torch.ones_like(ids)
    if left:
        mask[0, :left] = 0
    if right:
        mask[1, TOKENS:] = 0
    ids = torch.where(mask.bool(), ids, 0)
    found = {"input_ids": ids, "attention_mask": mask}
    if left:
        found["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return found


def cache_of(model: nn.Module, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    cache = DynamicCache()  # not of the configuration, which would keep no more than a window
    model(**batch, use_cache=True, past_key_values=cache)
    return [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


def same(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest element: elements near zero carry the rounding of large ones."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def kv_loss(keys: Any, values: Any, mask: Tensor) -> Tensor:
    """A loss on every layer's real tokens that weighs each element differently."""
    total = torch.zeros(())
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        weights = torch.linspace(0.5, 2.0, key[0].numel()).view_as(key[0]) * (layer + 1)
        real = mask[:, None, :, None].bool()
        total = total + ((key * weights).tanh() * real).sum() + ((value * weights).square() * real).sum()
    return total


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_capture_equals_cache(family: str, padding: str) -> None:
    model, batch = make_model(family), inputs(padding)
    with torch.no_grad():
        keys, values = cache_of(model, batch)
        with KVCapture(model, rope="post") as capture:
            model(**batch, use_cache=False)
    assert len(capture.states.keys) == len(capture.states.values) == 3
    real = batch["attention_mask"][:, None, :, None].bool()
    for layer in range(3):
        for found, expected in (
            (capture.states.keys[layer], keys[layer]),
            (capture.states.values[layer], values[layer]),
        ):
            # What a left-padding token attends to is nothing: transformers leaves its values undefined.
            same(torch.where(real, found, 0.0), torch.where(real, expected, 0.0))
            assert found.stride(-1) == 1
    capture.states.check(KVShape.from_config(model.config), side="student")


@pytest.mark.parametrize("family", FAMILIES)
def test_unrotated_keys_become_the_cache_when_rotated_by_hand(family: str) -> None:
    model, batch = make_model(family), inputs()
    with torch.no_grad():
        keys, _ = cache_of(model, batch)
        with KVCapture(model) as capture:  # rope="pre" is the default
            model(**batch, use_cache=False)
    for layer, (found, expected) in enumerate(zip(capture.states.keys, keys, strict=True)):
        if family == "gpt2" or (family == "smollm3" and layer == 1):  # which rotate nothing
            same(found, expected)
            continue
        parameters = model.config.rope_parameters
        parameters = parameters.get(MIXED[layer], parameters)
        base = parameters["rope_theta"]
        width = int(found.shape[-1] * parameters.get("partial_rotary_factor", 1))
        half = width // 2
        angle = torch.arange(TOKENS)[:, None] * base ** (-torch.arange(half) / half)
        first, second = found[..., :half], found[..., half:width]
        cos, sin = angle.cos(), angle.sin()
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin, found[..., width:]), -1)
        torch.testing.assert_close(rotated, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_through_the_cache(family: str, checkpointing: bool) -> None:
    model, batch = make_model(family), inputs("right")
    kv_loss(*cache_of(model, batch), batch["attention_mask"]).backward()
    expected = gradients(model)

    model.train()  # transformers checkpoints in training mode alone
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with KVCapture(model, rope="post", require_grad=True) as capture:
        backbone(model)(**batch, use_cache=False)
    kv_loss(*capture.states, batch["attention_mask"]).backward()
    found = gradients(model)

    projections = [name for name in expected if any(part in name for part in (".k_proj.w", ".v_proj.w", *FUSED))]
    assert len(projections) == (3 if family in ("gpt2", "gpt_neox", "phi3") else 6)
    assert any("embed" in name or "wte" in name for name in expected)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if "k_proj" in name or "v_proj" in name:
            assert gradient.norm() > 0, name
        same(found[name], gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_capture_has_the_same_values(family: str) -> None:
    model, batch = make_model(family), inputs("right")
    with torch.no_grad():
        keys, values = cache_of(model, batch)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with KVCapture(model, rope="post", require_grad=True) as capture:
        hidden = backbone(model)(**batch, use_cache=False).last_hidden_state
    before = [key.detach().clone() for key in capture.states.keys]
    (hidden.square().sum() + kv_loss(*capture.states, batch["attention_mask"])).backward()  # recomputes every layer
    for found, again, expected in zip(capture.states.keys, before, keys, strict=True):
        same(found.detach(), expected)
        assert torch.equal(found.detach(), again)
    for found, expected in zip(capture.states.values, values, strict=True):
        same(found.detach(), expected)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gpt2"])
def test_capture_of_model_and_of_backbone_agree(family: str) -> None:
    model, batch = make_model(family), inputs()
    captured = []
    for holder in (model, backbone(model)):
        with torch.no_grad(), KVCapture(holder) as capture:
            backbone(model)(**batch)
        captured.append(capture.states)
    for one, other in zip(captured[0].keys, captured[1].keys, strict=True):
        assert torch.equal(one, other)


def test_shape_counts_key_value_heads_and_own_head_dim() -> None:
    assert KVShape.from_config(CONFIGS["qwen3"]) == KVShape(3, 2, 10, 4)
    assert KVShape.from_config(CONFIGS["qwen2"]) == KVShape(3, 2, 6, 4)
    assert KVShape.from_config(CONFIGS["gpt2"]) == KVShape(3, 4, 6, 4)


def test_wrong_shape_names_the_side() -> None:
    model = make_model("qwen2")
    with torch.no_grad(), KVCapture(model) as capture:
        model(**inputs())
    with pytest.raises(InputError, match="teacher: its first batch has 3 layers × 2 KV heads × 6"):
        capture.states.check(KVShape(3, 2, 8, 4), side="teacher")


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_capture_under_no_grad_raises(family: str) -> None:
    model = make_model(family)
    with pytest.raises(RuntimeError, match="carry no graph"), KVCapture(model, require_grad=True), torch.no_grad():
        model(**inputs())
    assert hook_count(model) == 0


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_capture_under_reentrant_checkpointing_raises(family: str) -> None:
    model = make_model(family).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    hooks = hook_count(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"), KVCapture(model, require_grad=True):
        model(**inputs(), use_cache=False)
    assert hook_count(model) == hooks


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_are_gone_after_success_and_after_exceptions(family: str, rope: str) -> None:
    model = make_model(family)
    with torch.no_grad(), KVCapture(model, rope=rope):
        assert hook_count(model) > 0
        model(**inputs())
    assert hook_count(model) == 0
    with pytest.raises(ValueError, match="on purpose"), KVCapture(model, rope=rope):
        raise ValueError("on purpose")
    assert hook_count(model) == 0
    with pytest.raises(RuntimeError, match="no forward ran"), KVCapture(model, rope=rope):
        pass
    assert hook_count(model) == 0


def test_unknown_family_and_rope_are_input_errors() -> None:
    model = make_model("qwen2")
    with pytest.raises(InputError, match="kv_rope=both"):
        KVCapture(model, rope="both")
    model.config = model.model.config = type("Config", (), {"model_type": "bert"})()
    with pytest.raises(InputError, match="model_type=bert"):
        KVCapture(model)
