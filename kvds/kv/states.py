"""Shapes of keys and values, and the tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from kvds.errors import InputError
from kvds.kv.families import FAMILIES

_KINDS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class KVShape:
    """How many keys and values a model computes per token.

    Attributes:
        num_hidden_layers: Layers with attention.
        num_key_value_heads: KV heads per layer (not query heads).
        head_dim: Dimension of one head.
        num_attention_heads: Query heads per layer.
        hidden_size: Width of the hidden states; 0 where nobody asks. No part of a comparison: models of one KV shape
            may differ in width.
    """

    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    num_attention_heads: int
    hidden_size: int = field(default=0, compare=False)

    @classmethod
    def from_config(cls, config: Any) -> KVShape:
        """Read the shape off a transformers configuration.

        Raises:
            InputError: it is not that of a causal language model, or its layers differ in heads or head_dim, or some
                have no attention to what comes before.
        """
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
            if _stated(config, name) is None:
                raise InputError(
                    f"model_type={config.model_type}: its configuration has no {name}; expected a causal language "
                    f"model such as {', '.join(sorted(FAMILIES))}"
                )
        check_causal(config)
        if others := sorted(set(getattr(config, "layer_types", None) or ()) - _KINDS):
            raise InputError(
                f"layer_types={'+'.join(others)}: expected {' or '.join(sorted(_KINDS))} in every layer, which alone "
                "have the keys and values of whole samples (or --alignment_mode none)"
            )
        heads = _same_in_all_layers(config, "num_attention_heads")
        return cls(
            num_hidden_layers=config.num_hidden_layers,
            num_key_value_heads=_same_in_all_layers(config, "num_key_value_heads") or heads,
            head_dim=_same_in_all_layers(config, "head_dim") or config.hidden_size // heads,
            num_attention_heads=heads,
            hidden_size=config.hidden_size,
        )

    @classmethod
    def estimated(cls, config: Any) -> KVShape:
        """The shape of any configuration, for counts of work and memory where nothing is captured."""

        def largest(name: str) -> int:
            value = _stated(config, name)
            return max(value) if isinstance(value, list | tuple) else value or 0

        heads, width = max(1, largest("num_attention_heads")), largest("hidden_size")
        groups = largest("num_key_value_heads") or heads
        return cls(config.num_hidden_layers, groups, largest("head_dim") or width // heads, heads, width)


def check_causal(config: Any) -> None:
    """Refuse a model whose configuration says that its attention sees what comes later.

    Raises:
        InputError: naming the setting.
    """
    for name, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
        if (value := getattr(config, name, None)) is not None and bool(value) is not causal:
            raise InputError(
                f"{name}={value}: its attention sees what comes later; expected a causal model ({name}={causal})"
            )


def _stated(config: Any, name: str) -> Any:
    """What a configuration calls ``name``, a list where it has one for each layer; None where it has none.

    transformers refuses to say of a whole model what it keeps for each layer (Gemma 4's ``head_dim``).
    """
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        return [getattr(layer, name) for layer in config.per_layer_config]
    return getattr(config, name, None)


def _same_in_all_layers(config: Any, name: str) -> Any:
    """The number called ``name``, also where a configuration lists it per layer; None where it has none."""
    value = _stated(config, name)
    if not isinstance(value, list | tuple):
        return value
    if len(set(value)) != 1:
        raise InputError(
            f"{name}={list(value)}: expected the same number in every layer (or --alignment_mode none, which reads no "
            "keys and values)"
        )
    return value[0]


KV_PARTS = ("keys", "values")


class KVStates(NamedTuple):
    """Keys and values of one forward, one tensor per layer: ``[batch, num_key_value_heads, tokens, head_dim]`` each.

    A side that nobody asked for may have no layers at all.

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
        expected = (shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim)
        for part in (self.keys, self.values):
            for layer in part:
                found = (len(part), layer.shape[1], layer.shape[3])
                if found != expected:
                    raise InputError(
                        f"{side}: its first batch has {found[0]} layers × {found[1]} KV heads × {found[2]} dimensions; "
                        f"expected {expected[0]} × {expected[1]} × {expected[2]} as its configuration says "
                        "(do the weights belong to it?)"
                    )
