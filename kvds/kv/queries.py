"""Keys and values of one forward together with the queries that attend to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from kvds.kv.capture import KVCapture
from kvds.kv.observed import ObservedLayer
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


class AttentionCapture(KVCapture):
    """Context manager: a :class:`KVCapture` of all layers whose ``states`` hold queries, too.

    Args:
        model: A causal language model or its backbone.
        rope: ``"pre"`` or ``"post"``, of the captured keys; queries are rotated always.
        require_grad: As for :class:`KVCapture`.
    """

    def __init__(self, model: nn.Module, *, rope: str = "pre", require_grad: bool = False) -> None:
        super().__init__(model, rope=rope, require_grad=require_grad, query_rows="all")

    def _collect(self) -> AttentionStates:  # type: ignore[override]  # its keys and values are those of KVStates
        keys, values = super()._collect()
        return AttentionStates(keys, values, tuple(map(self._layer_queries, self.observed)))

    def _layer_queries(self, layer: ObservedLayer) -> LayerQueries:
        rotation, queries = layer.rotation, layer.unrotated_queries
        if rotation is None:
            return LayerQueries(queries, layer.scaling, None)
        return LayerQueries(rotation.queries(queries), layer.scaling, rotation.keys if self._rope == "pre" else None)
