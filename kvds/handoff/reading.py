"""Reading: a model's keys and values of left- or right-padded prompts, and how a cache of transformers is filled."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvds.kv import KVCapture, KVStates
from kvds.kv.attention_layout import arguments_of
from kvds.kv.families import attention_layouts, backbone
from kvds.kv.last_layer import only_keys_and_values
from kvds.kv.observed import Rotation


def positions_of(mask: Tensor) -> Tensor:
    """``[B, T]`` int64 position of each real token among those of its row; 0 for padding before it."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def read_states(model: nn.Module, input_ids: Tensor, mask: Tensor) -> KVStates:
    """Keys before the rotary embedding and values of every token, zero at padding; no head is run and no graph kept.

    Args:
        model: Of a known family, in evaluation mode.
        input_ids: ``[B, T]``.
        mask: ``[B, T]`` bool, padding on either side.
    """
    body = backbone(model)
    with KVCapture(body) as capture, only_keys_and_values(body):
        body(input_ids=input_ids, attention_mask=mask.long(), position_ids=positions_of(mask), use_cache=False)
    return without_padding(capture.states, mask)


def without_padding(states: KVStates, mask: Tensor) -> KVStates:
    """Zeros at padding: attention weighs it with 0, and 0 times what is not finite is not 0."""
    hidden = ~mask[:, None, :, None]
    return KVStates(*(tuple(layer.masked_fill(hidden, 0.0) for layer in part) for part in states))


def fill_cache(student: nn.Module, states: KVStates, mask: Tensor, *, windowed: bool = True) -> DynamicCache:
    """A cache of transformers that holds ``states``, keys rotated as the student rotates them.

    Args:
        student: A causal language model or its backbone.
        states: Its keys before the rotary embedding and values, per layer ``[B, H, T, D]``, T at least 1.
        mask: ``[B, T]`` bool; positions count real tokens.
        windowed: Keep no more than the student's window, where it has one.
    """
    body: Any = backbone(student)
    positions = positions_of(mask)
    angles: dict[str, tuple[Tensor, Tensor]] = {}  # some families rotate each kind of layers by its own
    cache = DynamicCache(config=body.config) if windowed else DynamicCache()
    for layer, (layout, keys, values) in enumerate(zip(attention_layouts(body), *states, strict=True)):
        if layout.rotary is not None:
            by_kind = "layer_type" in arguments_of(body.rotary_emb)
            kind = body.config.layer_types[layer] if by_kind else ""
            if kind not in angles:
                angles[kind] = body.rotary_emb(keys, positions, *([kind] if by_kind else []))
            keys = Rotation(layout.rotary, *angles[kind], None).keys(keys)
        cache.update(keys, values, layer)
    return cache


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its cache: ``cache``, in earlier transformers ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(backbone(model).forward).parameters else "past_key_values"
