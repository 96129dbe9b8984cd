"""Alignment loss: what an aligner returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.settings import AlignmentSettings
from kvds.kv.states import KV_PARTS

# What an aligner has a part for; the place is that of the part's random start.
PART_NAMES = ("key", "value", "hidden_state")
PARTS = {"kv": ("key", "value"), "k": ("key",), "v": ("value",)}


def parts_of(settings: AlignmentSettings) -> tuple[str, ...]:
    """The parts of :data:`PART_NAMES` that a mode of keys and values compares, as ``kv_parts`` asks for them."""
    chosen = settings.kv_parts
    return PARTS[ALIGNMENT_MODES[settings.alignment_mode].parts if chosen == "auto" else chosen]


def state_names(settings: AlignmentSettings) -> tuple[str, ...]:
    """The fields of :class:`kvds.kv.KVStates` that are read of a teacher: those of :func:`parts_of` the settings,
    or all where a student writes from them.
    """
    if settings.handoff_weight:
        return KV_PARTS
    return tuple(f"{part}s" for part in parts_of(settings))


class AlignmentLoss(NamedTuple):
    """The KV loss of a micro-batch: means over its selected positions, fp32 (fp64 for fp64 states).

    A named tuple, since ZeRO-3 finds the tensors that leave a module only in tuples, lists and dicts.

    Attributes:
        loss: Mean over the parts asked for, scalar with a graph.
        key_loss: Of keys, detached; None when keys are not matched.
        value_loss: Of values, detached; None when values are not matched.
        key_layers: ``[L_y]`` per target layer (per pair with a hard layer map), detached.
        value_layers: The same for values.
        attention_loss: Of the attention that keys receive, detached; None where it is not compared.
    """

    loss: Tensor
    key_loss: Tensor | None
    value_loss: Tensor | None
    key_layers: Tensor | None
    value_layers: Tensor | None
    attention_loss: Tensor | None = None


def average_parts(parts: dict[str, tuple[Tensor, Tensor]]) -> AlignmentLoss:
    """Average the parts, those of :data:`PART_NAMES` that there are, each a loss with a graph and losses per layer."""
    loss = torch.stack([part for part, _ in parts.values()]).mean()
    keys, values = parts.get("key"), parts.get("value")
    return AlignmentLoss(
        loss,
        None if keys is None else keys[0].detach(),
        None if values is None else values[0].detach(),
        None if keys is None else keys[1].detach(),
        None if values is None else values[1].detach(),
    )
