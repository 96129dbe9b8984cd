"""A forward for keys and values alone, without what comes after the last layer's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from kvds.kv.families import attention_modules, decoder_layers
from kvds.kv.module_forward import forward_of


@contextlib.contextmanager
def only_keys_and_values(backbone: nn.Module, *, queries: bool = False) -> Iterator[None]:
    """Within it, the last layer of ``backbone`` projects its keys and values and does no more.

    Its attention, output projection and MLP feed nothing that keys, values and queries read: of n layers, almost one is
    saved. All layers' projections run as ever, with their hooks; the backbone's output is meaningless. Modules, not
    forwards, are left out, so that ZeRO-3 never gathers their weights.

    Args:
        backbone: Of a family in :data:`kvds.kv.families.FAMILIES`, run without gradient.
        queries: Project the last layer's queries, too.
    """
    layer: Any = decoder_layers(backbone)[-1]
    attention: Any = attention_modules(backbone)[-1]

    def project(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        if hasattr(attention, "c_attn"):
            attention.c_attn(hidden_states)
        else:
            for name in ("q", "k") if queries else ("k",):
                projected = getattr(attention, f"{name}_proj")(hidden_states)
                if hasattr(attention, f"{name}_norm"):
                    getattr(attention, f"{name}_norm")(projected.unflatten(-1, (-1, attention.head_dim)))
            attention.v_proj(hidden_states)
        return hidden_states, None

    with forward_of(attention, project), forward_of(layer.mlp, lambda hidden_states: hidden_states):
        yield
