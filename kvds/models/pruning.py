"""Depth pruning: a smaller model made of some of a model's own layers, in their order, and nothing else changed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvds.errors import InputError
from kvds.kv.families import layers_name


def check_kept_layers(keep: Sequence[int], num_hidden_layers: int) -> None:
    """Refuse a choice that is not an ascending selection of at least one of the model's layers."""
    wrong = [layer for layer in keep if not 0 <= layer < num_hidden_layers]
    if wrong or not keep or list(keep) != sorted(set(keep)):
        raise InputError(
            f"--keep {','.join(map(str, keep)) or '(nothing)'}: expected layers of 0 to {num_hidden_layers - 1}, each "
            "once, in ascending order"
        )


def pruned_config(config: PreTrainedConfig, keep: Sequence[int]) -> PreTrainedConfig:
    """``config`` with ``len(keep)`` layers; what it lists layer by layer (``layer_types``) follows the layers kept."""
    before = int(config.num_hidden_layers)
    check_kept_layers(keep, before)
    values = config.to_dict()
    for key, value in values.items():
        if (key.startswith("layer_") or key.endswith("_layers")) and isinstance(value, list) and len(value) == before:
            values[key] = [value[layer] for layer in keep]
    values[type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(keep)
    return type(config).from_dict(values)


def prune_layers(model: Any, keep: Sequence[int]) -> nn.Module:
    """A model of the layers ``keep`` of ``model``, with the same embeddings, last norm and head.

    Args:
        model: A causal language model, whole.
        keep: Layers, counted from 0, ascending.

    Returns:
        A model of its own (copies of the weights), in the same dtype and on the same device, with the generation
        configuration of ``model``.

    Raises:
        InputError: no list of layers, or layers that the model does not have.
    """
    config = pruned_config(model.config, keep)
    place = f"{model.base_model_prefix}.{layers_name(model)}."
    number = re.compile(re.escape(place) + r"(\d+)\.")
    state = {}
    for name, tensor in model.state_dict().items():
        found = number.match(name)
        if found is None:
            state[name] = tensor
        elif int(found[1]) in keep:
            state[f"{place}{list(keep).index(int(found[1]))}.{name[found.end() :]}"] = tensor
    parameter = next(model.parameters())
    with torch.random.fork_rng(devices=[]), torch.device(parameter.device):
        pruned = AutoModelForCausalLM.from_config(
            config, dtype=parameter.dtype, attn_implementation=model.config._attn_implementation
        )
    pruned.load_state_dict(state, strict=True)
    pruned.tie_weights()
    pruned.generation_config = model.generation_config
    return pruned.train(model.training)
