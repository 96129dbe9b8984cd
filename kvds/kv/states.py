"""Shapes of keys and values, and the tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from kvds.errors import InputError
from kvds.kv.families import FAMILIES


@dataclass(frozen=True)
class KVShape:
    """How many keys and values a model computes per token.

    Attributes:
        num_hidden_layers: Layers with attention.
        num_key_value_heads: KV heads per layer (not query heads).
        head_dim: Dimension of one head.
        num_attention_heads: Query heads per layer.
    """

    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    num_attention_heads: int

    @classmethod
    def from_config(cls, config: Any) -> KVShape:
        """Read the shape off a transformers configuration.

        Raises:
            InputError: the model family is not one whose keys and values kvds can capture.
        """
        if config.model_type not in FAMILIES:
            raise InputError(
                f"model_type={config.model_type}: kvds captures keys and values of {', '.join(sorted(FAMILIES))}; "
                f"expected a model of one of these families"
            )
        heads = config.num_attention_heads
        return cls(
            num_hidden_layers=config.num_hidden_layers,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            num_attention_heads=heads,
        )


class KVStates(NamedTuple):
    """Keys and values of one forward, one tensor per layer: ``[batch, num_key_value_heads, tokens, head_dim]`` each.

    A named tuple, since ZeRO-3 finds the tensors that enter and leave a module only in tuples, lists and dicts.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def detach(self) -> KVStates:
        """The same without a graph."""
        return KVStates(tuple(k.detach() for k in self.keys), tuple(v.detach() for v in self.values))

    def check(self, shape: KVShape, *, side: str) -> None:
        """Compare with the shape that a configuration promises.

        Raises:
            InputError: another number of layers, heads or dimensions.
        """
        found = (len(self.keys), self.keys[0].shape[1], self.keys[0].shape[3])
        expected = (shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim)
        if found != expected or len(self.values) != len(self.keys):
            raise InputError(
                f"{side}: its first batch has {found[0]} layers × {found[1]} KV heads × {found[2]} dimensions; "
                "expected "
                f"{expected[0]} × {expected[1]} × {expected[2]} as its configuration says (do the weights belong to "
                "it?)"
            )
