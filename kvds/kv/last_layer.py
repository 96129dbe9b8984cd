"""A forward for keys and values alone, without what comes after the last layer's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from kvds.kv.attention_layout import arguments_of
from kvds.kv.families import attention_modules, decoder_layers
from kvds.kv.module_forward import forward_of

# What attention calls its cache, which it hands keys and values to before it attends.
_CACHES = ("cache", "past_key_values", "layer_past")


class _KeysAndValuesAreThere(Exception):
    """Nothing after them is to be computed."""


class _FullCache:
    """A cache that takes nothing."""

    def update(self, *_: Any, **__: Any) -> None:
        raise _KeysAndValuesAreThere


@contextlib.contextmanager
def only_keys_and_values(backbone: nn.Module) -> Iterator[None]:
    """Within it, the last layer of ``backbone`` projects its queries, keys and values and does no more.

    Its attention, output projection and MLP feed nothing that keys, values and queries read: of n layers, almost one is
    saved. All layers' projections run as ever, with their hooks; the backbone's output is meaningless. Modules, not
    forwards, are left out, so that ZeRO-3 never gathers their weights.

    Args:
        backbone: Run without gradient.
    """
    layer: Any = decoder_layers(backbone)[-1]
    attention: Any = attention_modules(backbone)[-1]
    # The class's own: a compiled layer's runs without a cache.
    whole = functools.partial(type(attention).forward, attention)
    cache = next(name for name in _CACHES if name in arguments_of(attention))

    def project(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        with contextlib.suppress(_KeysAndValuesAreThere):
            whole(hidden_states, *args, **(kwargs | {cache: _FullCache()}))
        return hidden_states, None

    with forward_of(attention, project), forward_of(layer.mlp, lambda hidden_states: hidden_states):
        yield
