"""Small models of families that scale or cap logits, or hidden states before the head."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

SCALED: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.2},
    "gemma2": {"final_logit_softcapping": 0.7, "attn_logit_softcapping": None},
    "cohere": {"logit_scale": 0.0625},
    "minicpm3": {"dim_model_base": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                 "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
}  # fmt: skip
"""Family → what its configuration says beside sizes."""


def small_scaled_config(family: str, *, vocab_size: int, initializer_range: float = 0.3) -> PreTrainedConfig:
    """Two layers of width 32."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": 1, "initializer_range": initializer_range,
    }  # fmt: skip
    return AutoConfig.for_model(family, vocab_size=vocab_size, **(sizes | SCALED[family]))
