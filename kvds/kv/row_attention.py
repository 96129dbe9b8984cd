"""Attention within the samples of a batch, told by their bounds: no mask is made, looked at or kept.

Registered with transformers under :data:`ROW_ATTENTION`, as the attention that models of a run are loaded with. In
place of a mask it takes a tensor of bounds; whatever else it is given (a mask, or none while text is generated) goes to
transformers' own ``sdpa``, and so does the making of masks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROW_ATTENTION = "kvds_rows"
"""Name of this attention in a model's configuration."""
# Widest head that torch's flash kernel takes, and what its width must be a multiple of.
_FLASH_HEAD_DIM, _FLASH_MULTIPLE = 256, 8
_CAUSAL = 1  # of torch's memory-efficient kernel: from the top left


def run_attention(setting: str) -> str:
    """From ``--attn_implementation`` to the name of the attention that a run's models are built with."""
    return ROW_ATTENTION if setting == "sdpa" else setting


def plain_attention(name: str) -> str:
    """The attention of a model that runs without kvds: the other way round."""
    return "sdpa" if name == ROW_ATTENTION else name


def bounds_as_mask(bounds: Tensor | None, device: torch.device) -> Tensor:
    """What stands in a model's ``attention_mask``: of four dimensions, which transformers hands on as it is.

    Args:
        bounds: ``[N + 1]`` int32, where the samples of the flattened rows ``[B · T]`` begin, and the end; None: each
            row is one sample, padded on the right.
        device: Of the model.

    Returns:
        ``[1, 1, 1, N + 1]`` int32; N + 1 = 0 without bounds.
    """
    if bounds is None:
        bounds = torch.empty(0, dtype=torch.int32, device=device)
    return bounds.view(1, 1, 1, -1)


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    max_length_q: int = 0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample, in transformers' attention interface.

    Rows padded on the right need no mask: no real token comes after padding, so that none sees it.

    Args:
        module: The attention module.
        query: ``[B, num_attention_heads, T, head_dim]``.
        key: ``[B, num_key_value_heads, T, head_dim]``.
        value: As ``key``.
        attention_mask: From :func:`bounds_as_mask`; anything else is for ``sdpa``.
        dropout: Of attention probabilities.
        scaling: What ``q · k`` is multiplied by.
        sliding_window: A query sees itself and the ``sliding_window - 1`` positions before it; None = all before it.
        max_length_q: At least the tokens of the longest sample, known to the host; the same from batch to batch, so
            that nothing is compiled anew.
        softcap: ``c`` of attention logits ``c · tanh(x / c)``, which no kernel here knows: they are made whole, sample
            by sample.
        **kwargs: Of other attentions.

    Returns:
        ``[B, T, num_attention_heads, head_dim]``, and no weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        if softcap is not None:
            return _whole(query, key, value, attention_mask, dropout, scaling, softcap).transpose(1, 2), None
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
        return output, None
    bounds = attention_mask.view(-1)
    if bounds.numel() == 0:
        return _row_by_row(query, key, value, dropout, scaling, sliding_window, softcap), None
    samples = [heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value)]  # [B · T, heads, head_dim]
    attend = _attention_of(samples[0], sliding_window)
    if softcap is not None:
        attend = functools.partial(_sample_by_sample, softcap=softcap)
    output = attend(*samples, bounds, max_length_q, dropout, scaling, sliding_window)
    return output.unflatten(0, (query.shape[0], -1)), None


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    mask = None
    tokens = query.shape[2]
    if window is not None and window < tokens:
        position = torch.arange(tokens, device=query.device)
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance < window)  # [T, T]
    if softcap is not None:
        return _whole(query, key, value, mask, dropout, scaling, softcap).transpose(1, 2)
    return _sdpa(query, key, value, mask, dropout, scaling).transpose(1, 2)


def _whole(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None,
    softcap: float,
) -> Tensor:  # fmt: skip
    """Attention from all its logits, capped; without a mask causal. ``[B, heads, T, head_dim]``."""
    groups = query.shape[1] // key.shape[1]
    key, value = (repeat_kv(heads, groups) if groups > 1 else heads for heads in (key, value))
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    logits = softcap * (logits / softcap).tanh()
    if mask is None:  # of several queries the last one sees all keys
        queries, keys = logits.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=logits.device).tril(keys - queries)
    least = torch.finfo(logits.dtype).min
    logits = logits.masked_fill(~mask, least) if mask.dtype == torch.bool else logits + mask
    weights = logits.softmax(-1, dtype=torch.promote_types(torch.float32, logits.dtype)).to(value.dtype)
    return F.dropout(weights, dropout) @ value


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """torch's own, causal without a mask; ``[B, heads, T, head_dim]``."""
    groups = query.shape[1] // key.shape[1]
    # Where torch's flash kernels take the call they know groups of heads; its others would be slow with them.
    half = query.dtype in (torch.bfloat16, torch.float16)
    native = mask is None and query.shape[3] <= _FLASH_HEAD_DIM and (half or not query.is_cuda)
    if groups > 1 and not native:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
        enable_gqa=native and groups > 1,
    )  # fmt: skip


def _attention_of(query: Tensor, window: int | None) -> Any:
    """The kernel that takes samples by their bounds where one does, else one sample after the other."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and query.shape[2] <= _FLASH_HEAD_DIM and query.shape[2] % _FLASH_MULTIPLE == 0:
        return _flash
    # The gradients of torch's memory-efficient kernel know of no window (2.11): there the host waits for the bounds.
    return _memory_efficient if query.is_cuda and window is None else _sample_by_sample


def _flash(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, dropout: float, scaling: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    return torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, dropout, True, False, scale=scaling, **sides
    )[0]


def _memory_efficient(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, dropout: float, scaling: float | None,
    window: None,
) -> Tensor:  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(groups, 1) if groups > 1 else heads for heads in (key, value))
    rows = [heads.unsqueeze(0) for heads in (query, key, value)]
    longest = min(longest, query.shape[0])  # its gradients refuse more than there are tokens
    return torch.ops.aten._efficient_attention_forward(
        *rows, None, bounds, bounds, longest, longest, dropout, _CAUSAL, True, scale=scaling
    )[0].squeeze(0)


def _sample_by_sample(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, dropout: float, scaling: float | None,
    window: int | None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    lengths = bounds.diff().tolist()
    parts = [heads.split(lengths) for heads in (query, key, value)]
    outputs = []
    for sample in zip(*parts, strict=True):
        own_query, own_key, own_value = (part.transpose(0, 1).unsqueeze(0) for part in sample)
        outputs.append(_row_by_row(own_query, own_key, own_value, dropout, scaling, window, softcap).squeeze(0))
    return torch.cat(outputs)


AttentionInterface.register(ROW_ATTENTION, row_attention)
# Without a mask function of its own a registered attention would get no mask at all, padding or not.
AttentionMaskInterface.register(ROW_ATTENTION, sdpa_mask)
