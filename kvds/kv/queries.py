"""Keys and values of one forward together with the queries that attend to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvds.kv.capture import KVCapture
from kvds.kv.families import FAMILIES
from kvds.kv.states import KVShape, KVStates

Rotation = Callable[[Tensor], Tensor]


class LayerQueries(NamedTuple):
    """The queries of one layer, as attention uses them.

    Attributes:
        queries: ``[B, num_attention_heads, T, head_dim]``, rotated where the model rotates.
        scaling: What attention multiplies ``q · k`` by.
        rotate: From keys ``[B, heads, T, head_dim]`` as captured to keys as attention uses them; None where those are
            the same.
    """

    queries: Tensor
    scaling: float
    rotate: Rotation | None


class AttentionStates(NamedTuple):
    """:class:`kvds.kv.KVStates` with the queries of each layer."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    queries: tuple[LayerQueries, ...]

    def detach(self) -> AttentionStates:
        """The same without a graph."""
        bare = tuple(layer._replace(queries=layer.queries.detach()) for layer in self.queries)
        return AttentionStates(*KVStates(self.keys, self.values).detach(), bare)

    def check(self, shape: KVShape, *, side: str) -> None:
        """As :meth:`KVStates.check`."""
        KVStates(self.keys, self.values).check(shape, side=side)


class AttentionCapture:
    """Context manager: a :class:`KVCapture` whose ``states`` hold queries, too.

    Args:
        model: A causal language model or its backbone.
        rope: ``"pre"`` or ``"post"``, of the captured keys; queries are rotated always.
        require_grad: As for :class:`KVCapture`.
    """

    def __init__(self, model: nn.Module, *, rope: str = "pre", require_grad: bool = False) -> None:
        self._kv = KVCapture(model, rope=rope, require_grad=require_grad)
        self._rope, config = rope, model.config
        self._shape = KVShape.from_config(config)
        family = FAMILIES[config.model_type]  # type: ignore[index, union-attr]
        self._backbone: Any = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
        self._attentions = [getattr(layer, family.attention) for layer in getattr(self._backbone, family.layers)]
        self._rotaries = [family.layout(attention).rotary for attention in self._attentions]
        self._handles: list[RemovableHandle] = []
        self._queries: dict[int, Tensor] = {}
        self._rotations: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> AttentionCapture:
        self._kv.__enter__()
        self._forget()
        self._handles.append(self._backbone.register_forward_pre_hook(self._forget))
        for layer, attention in enumerate(self._attentions):
            module = next(m for name in ("q_norm", "q_proj", "c_attn") if (m := getattr(attention, name, None)))
            self._handles.append(module.register_forward_hook(self._query_hook(layer)))
            if self._rotaries[layer] is not None:
                hook = self._rotation_hook(layer)
                self._handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *details: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kv.__exit__(exc_type, *details)
        if exc_type is not None:
            self._forget()

    @property
    def states(self) -> AttentionStates:
        """Keys, values and queries of the last forward."""
        keys, values = self._kv.states
        return AttentionStates(keys, values, tuple(self._layer(i) for i in range(len(self._attentions))))

    @property
    def watched(self) -> list[tuple[Tensor, Tensor, slice]]:
        """As :attr:`KVCapture.watched`: queries are not among what is watched."""
        return self._kv.watched

    def _layer(self, layer: int) -> LayerQueries:
        heads, dim = self._shape.num_attention_heads, self._shape.head_dim
        # A fused projection holds queries first; a norm puts out heads apart.
        queries = self._queries[layer].flatten(2)[..., : heads * dim].unflatten(2, (heads, dim)).transpose(1, 2)
        scaling = float(getattr(self._attentions[layer], "scaling", dim**-0.5))
        rotary = self._rotaries[layer]
        if rotary is None:
            return LayerQueries(queries, scaling, None)
        cos, sin = self._rotations[layer]

        def rotate(states: Tensor) -> Tensor:
            # The function rotates queries and keys alike; an empty query costs nothing.
            return rotary(torch.empty_like(states[:, :0]), states, cos, sin)[1]

        return LayerQueries(rotate(queries), scaling, rotate if self._rope == "pre" else None)

    def _forget(self, *_: Any) -> None:
        self._queries.clear()
        self._rotations.clear()

    def _query_hook(self, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self._queries.setdefault(layer, output)

        return hook

    def _rotation_hook(self, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rotation = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
            if rotation is not None:
                self._rotations.setdefault(layer, rotation)

        return hook
