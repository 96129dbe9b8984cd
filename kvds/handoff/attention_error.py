"""Attention-output error: what a mapped cache changes of what attention hands on, all that a student sees of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvds.handoff.continuation import Continuation
from kvds.kv import KVStates
from kvds.kv.families import attention_layouts, backbone
from kvds.kv.queries import AttentionCapture, AttentionStates, LayerQueries


@torch.no_grad()
def own_attention(student: nn.Module, input_ids: Tensor, mask: Tensor) -> AttentionStates:
    """Keys, values and queries of the student's own forward on whole rows, padded on the right."""
    body = backbone(student)
    with AttentionCapture(body) as capture:
        body(input_ids=input_ids, attention_mask=mask.long(), use_cache=False)
    states: AttentionStates = capture.states  # type: ignore[assignment]
    return states


def attention_output_error(student: nn.Module, own: AttentionStates, mapped: KVStates, row: Continuation) -> Tensor:
    """``Σ ‖o'_i − o_i‖² / Σ ‖o_i‖²`` of layer i: ``o`` with the student's own cache of the prompt, ``o'`` with another.

    The queries are the student's own of the tokens that follow the prompt, each layer's by itself: no error of one
    layer reaches the next.

    Args:
        student: For its window.
        own: From :func:`own_attention`, of whole rows ``[B, H, T, D]``.
        mapped: Of the cache's slots, ``[B, H, P, D]``, keys before the rotary embedding; may have a graph.
        row: Of the batch.

    Returns:
        ``[L]`` fp32.
    """
    layouts = attention_layouts(student)
    tokens = own.keys[0].shape[2]
    distance = row.index[:, :, None] - torch.arange(tokens, device=row.index.device)  # [B, C, T]
    errors = []
    for layer, (layout, queries) in enumerate(zip(layouts, own.queries, strict=True)):
        visible = distance >= 0
        if layout.sliding_window is not None:
            visible &= distance < layout.sliding_window
        rows = row.index[:, None, :, None].expand(-1, queries.queries.shape[1], -1, queries.queries.shape[3])
        asked = queries.queries.gather(2, rows).float()
        wanted = _attended(queries, asked, own.keys[layer], own.values[layer], visible)
        keys, values = (_placed(part[layer], new[layer], row) for part, new in zip(own[:2], mapped, strict=True))
        found = _attended(queries, asked, keys, values, visible)
        counts = row.mask[:, None, :, None]
        difference = (found - wanted).square().masked_fill(~counts, 0.0).sum()
        errors.append(difference / wanted.square().masked_fill(~counts, 0.0).sum().clamp_min(1e-30))
    return torch.stack(errors)


def _attended(layer: LayerQueries, asked: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """``[B, num_attention_heads, C, D]`` fp32 of queries ``asked`` over keys before the rotary embedding and values."""
    keys = keys if layer.rotate is None else layer.rotate(keys)
    groups = asked.shape[1] // keys.shape[1]
    keys, values = (heads.float().repeat_interleave(groups, 1) for heads in (keys, values))
    logits = (asked @ keys.mT * layer.scaling).masked_fill(~visible[:, None], -torch.inf)
    return logits.softmax(-1) @ values


def _placed(own: Tensor, mapped: Tensor, row: Continuation) -> Tensor:
    """``own [B, H, T, D]`` with what the cache's slots hold in place of the prompt's."""
    index, kept = row.prompt_index[:, None, :, None], row.prompt_mask[:, None, :, None]
    places = index.expand_as(mapped)
    # Slots of padding all name position 0, which the first real slot names, too: they must add nothing.
    there = torch.zeros_like(own).scatter_add(2, places, mapped.to(own.dtype).masked_fill(~kept, 0.0))
    taken = torch.zeros_like(own[:, :1, :, :1]).scatter_add(2, index, kept.to(own.dtype))
    return torch.where(taken > 0, there, own)
