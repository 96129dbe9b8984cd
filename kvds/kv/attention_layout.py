"""Where an attention module computes queries, keys and values, and how it compares them: found in the module itself.

Most families name their projections ``q_proj``, ``k_proj`` and ``v_proj``, may normalise queries and keys, and rotate
them by ``apply_rotary_pos_emb``, a function beside the attention's class. What a family does otherwise is a field of
its :class:`Family`. What is in neither is refused, by the name of what was looked for.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvds.errors import InputError

_NORMS = ("norm", "layernorm")
_HEAD_DIMS = ("head_dim", "head_size")
OUTPUTS = ("o_proj", "c_proj", "dense", "out_proj")
"""What attentions call the projection of their heads' outputs."""


@dataclass(frozen=True)
class Family:
    """What a family does otherwise than most.

    Attributes:
        fused: Name of the one module that gives queries, keys and values; empty: each has its own.
        fused_by_head: Whether the columns of ``fused`` are those of one head after the other, query, key and value of
            each; else all queries, then all keys, then all values.
        norm_by_head: Whether norms of queries and keys are given ``[B, heads, T, head_dim]``; else tokens before heads,
            or not yet heads at all.
        tensor_parallel: Whether heads can be dealt out to several ranks.
    """

    fused: str = ""
    fused_by_head: bool = False
    norm_by_head: bool = False
    tensor_parallel: bool = False


@dataclass(frozen=True)
class Born:
    """Where one of queries, keys and values is computed.

    Attributes:
        module: Its output holds them.
        heads: From that output to ``[B, heads, T, head_dim]``, a view.
        projection: What multiplies hidden states, where a norm follows it.
    """

    module: nn.Module
    heads: Callable[[Tensor], Tensor]
    projection: nn.Module


@dataclass(frozen=True)
class AttentionLayout:
    """What one attention layer compares, before the rotary embedding.

    Attributes:
        query: Its heads are the ``num_attention_heads``.
        key: Its heads are the ``num_key_value_heads``.
        value: As ``key``.
        rotary: Function ``(q, k, cos, sin) -> (q, k)``, or None where the layer rotates nothing.
        scaling: What attention multiplies ``q · k`` by.
        sliding_window: A query sees itself and the ``sliding_window - 1`` positions before it; None = all before it.
        softcap: ``c`` of attention logits ``c · tanh(x / c)``; None = not capped.
    """

    query: Born
    key: Born
    value: Born
    rotary: Callable[..., Any] | None
    scaling: float
    sliding_window: int | None
    softcap: float | None


def attention_layout(attention: Any, family: Family) -> AttentionLayout:
    """The layout of ``attention``.

    Raises:
        InputError: it has not what keys and values are read off; the message says what.
    """
    dim = _first(attention, _HEAD_DIMS, "the size of a head")
    if family.fused:
        fused = _first(attention, (family.fused,), "the projection of queries, keys and values")
        born = [Born(fused, _part_of(number, attention.config, dim, family), fused) for number in range(3)]
    else:
        if getattr(attention, "is_kv_shared_layer", False):
            raise _not_found(attention, "keys and values of its own: it reads those of a layer before")
        born = [_separate(attention, name, dim, family) for name in ("q", "k", "v")]
    scaling = _first(attention, ("scaling",), "what it multiplies q · k by")
    cap = getattr(attention, "attn_logit_softcapping", None)
    query, key, value = born
    return AttentionLayout(query, key, value, _rotary(attention), scaling, _window(attention), cap)


def output_projection(attention: nn.Module) -> nn.Module | None:
    """What maps the outputs of a layer's query heads, side by side, to the output of its attention; None where it has
    none of the names that are known.
    """
    found = (getattr(attention, name, None) for name in OUTPUTS)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def _not_found(attention: nn.Module, what: str) -> InputError:
    return InputError(
        f"{type(attention).__name__} has not {what}; expected an attention whose keys and values can be read off "
        "(or --alignment_mode none)"
    )


def _first(attention: Any, names: tuple[str, ...], what: str) -> Any:
    for name in names:
        if (found := getattr(attention, name, None)) is not None:
            return found
    raise _not_found(attention, f"{' or '.join(names)}, {what}")


def _separate(attention: Any, name: str, dim: int, family: Family) -> Born:
    words = {"q": "queries", "k": "keys", "v": "values"}
    projection = _first(attention, (f"{name}_proj",), f"the projection of {words[name]}")
    norms = [getattr(attention, f"{name}_{norm}", None) for norm in _NORMS]
    norm = next((module for module in norms if module is not None), None)
    if norm is not None and family.norm_by_head:
        return Born(norm, lambda output: output, projection)

    def heads(output: Tensor) -> Tensor:
        # An output with heads already keeps them, whatever their number: the caller compares it with what is promised.
        if output.dim() == 3 and output.shape[-1] % dim == 0:
            output = output.unflatten(-1, (-1, dim))
        return output.transpose(1, 2)

    return Born(projection if norm is None else norm, heads, projection)


def _part_of(number: int, config: Any, dim: int, family: Family) -> Callable[[Tensor], Tensor]:
    """Of a fused projection's output, queries (0), keys (1) or values (2)."""
    if family.fused_by_head:
        columns = slice(number * dim, (number + 1) * dim)
        return lambda output: output.unflatten(-1, (-1, 3 * dim))[..., columns].transpose(1, 2)
    queries = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or queries
    begin, count = ((0, queries), (queries, groups), (queries + groups, groups))[number]
    columns = slice(begin * dim, (begin + count) * dim)
    return lambda output: output[..., columns].unflatten(-1, (-1, dim)).transpose(1, 2)


def arguments_of(module: nn.Module) -> frozenset[str]:
    """The names of what the forward of a module's class takes."""
    return _arguments_of(type(module))  # type: ignore[arg-type]  # a class is hashable


@functools.cache
def _arguments_of(kind: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


def _rotary(attention: Any) -> Callable[..., Any] | None:
    if "position_embeddings" not in arguments_of(attention) or not getattr(attention, "use_rope", True):
        return None
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        raise _not_found(attention, "apply_rotary_pos_emb beside it, which rotates its keys")

    def partial(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        width = cos.shape[-1]
        if width == key.shape[-1]:
            rotated: tuple[Tensor, Tensor] = rotate(query, key, cos, sin)
            return rotated
        turned = rotate(query[..., :width], key[..., :width], cos, sin)
        first, second = (torch.cat((a, b[..., width:]), -1) for a, b in zip(turned, (query, key), strict=True))
        return first, second

    return partial


def _window(attention: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
        return window
    # Some keep it in the configuration alone, the same for all layers.
    config = getattr(attention, "config", None)
    return None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
