"""Layer gathering: ZeRO-3 gathers a decoder layer at a time, not each of its projections and norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kvds.kv.families import decoder_layers

_SET_BY_THE_FILE = ("leaf_module", "stage3_module_granularity_threshold")


def gather_whole_layers(model: nn.Module, engine_config: Mapping[str, Any]) -> list[nn.Module]:
    """Mark the decoder layers that a ZeRO-3 engine around ``model`` shall gather as one (DeepSpeed's leaf modules).

    DeepSpeed otherwise runs its hooks, and asks for weights, once per projection and norm: of a small student the host
    spends longer with that than with the layer itself (``benchmarks/bench_layer_gathering.py``). Losses and gradients
    are the same.

    DeepSpeed notices that a whole layer's backward pass begins by the gradient of its output. A student's last layer
    always gets one, be it zero: the task loss is part of the loss at a weight of 0, too.

    The last layer of a frozen model stays in parts, since a teacher runs no more of it than its projections of keys
    and values (:func:`kvds.kv.last_layer.only_keys_and_values`). So does a model some of whose weights train and some
    do not: of a layer whose input has no gradient DeepSpeed reduces the gradients before they are there.

    Args:
        model: A causal language model; no engine is built around it yet.
        engine_config: DeepSpeed's configuration. What it says itself about the size of what is gathered stands.

    Returns:
        The layers that are gathered whole.
    """
    zero = engine_config["zero_optimization"]
    if zero["stage"] != 3 or any(name in zero for name in _SET_BY_THE_FILE):
        return []
    trained = {parameter.requires_grad for parameter in model.parameters()}
    if len(trained) != 1:
        return []
    from deepspeed.utils import set_z3_leaf_module  # a replicated teacher runs where DeepSpeed is not installed

    layers = list(decoder_layers(model))
    whole = layers if trained == {True} else layers[:-1]
    for layer in whole:
        set_z3_leaf_module(layer, True)
    return whole
