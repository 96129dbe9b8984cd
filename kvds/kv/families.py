"""Where the supported model families compute keys and values: one entry a family.

A family says which sub-modules' outputs hold an attention layer's keys and values before the rotary embedding, and in
which columns of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class AttentionLayout:
    """The modules of one attention layer whose outputs hold keys and values.

    Attributes:
        key_module: Its output ends as ``[B, T, heads · head_dim]`` or ``[B, T, heads, head_dim]``.
        key_columns: Which part of the last dimension holds keys.
        value_module: As ``key_module``, for values.
        value_columns: As ``key_columns``, for values.
        rotary: Function ``(q, k, cos, sin) -> (q, k)`` of the model, or None where positions are learned.
    """

    key_module: nn.Module
    key_columns: slice
    value_module: nn.Module
    value_columns: slice
    rotary: Callable[..., Any] | None


ALL = slice(None)


def _separate(attention: Any, rotary: Callable[..., Any]) -> AttentionLayout:
    return AttentionLayout(attention.k_proj, ALL, attention.v_proj, ALL, rotary)


def _qwen2(attention: Any) -> AttentionLayout:
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    return _separate(attention, apply_rotary_pos_emb)


def _llama(attention: Any) -> AttentionLayout:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return _separate(attention, apply_rotary_pos_emb)


def _mistral(attention: Any) -> AttentionLayout:
    from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

    return _separate(attention, apply_rotary_pos_emb)


def _gemma(attention: Any) -> AttentionLayout:
    from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

    return _separate(attention, apply_rotary_pos_emb)


def _qwen3(attention: Any) -> AttentionLayout:
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    # Keys are normalised per head before they are rotated: what attention compares is the norm's output.
    return AttentionLayout(attention.k_norm, ALL, attention.v_proj, ALL, apply_rotary_pos_emb)


def _gpt2(attention: Any) -> AttentionLayout:
    width = attention.split_size
    keys, values = slice(width, 2 * width), slice(2 * width, 3 * width)
    return AttentionLayout(attention.c_attn, keys, attention.c_attn, values, None)


@dataclass(frozen=True)
class Family:
    """How to walk from a backbone to its attention layers.

    Attributes:
        layers: Name of the backbone's list of layers.
        attention: Name of a layer's attention module.
        layout: From an attention module to its :class:`AttentionLayout`.
    """

    layers: str
    attention: str
    layout: Callable[[Any], AttentionLayout]


FAMILIES: dict[str, Family] = {
    "gemma": Family("layers", "self_attn", _gemma),
    "gpt2": Family("h", "attn", _gpt2),
    "llama": Family("layers", "self_attn", _llama),
    "mistral": Family("layers", "self_attn", _mistral),
    "qwen2": Family("layers", "self_attn", _qwen2),
    "qwen3": Family("layers", "self_attn", _qwen3),
}
