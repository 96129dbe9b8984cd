"""What an aligner returns, and the statistics of the fixed side that it measures residuals in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvds.kv import KVShape


class AlignmentLoss(NamedTuple):
    """The KV loss of a micro-batch.

    A named tuple, since ZeRO-3 finds the tensors that leave a module only in tuples, lists and dicts.

    Attributes:
        loss: Mean over the parts asked for, fp32 scalar with a graph.
        key_loss: Of keys, detached; None when keys are not matched.
        value_loss: Of values, detached; None when values are not matched.
        key_layers: ``[L]`` per matched pair of layers, detached.
        value_layers: The same for values.
    """

    loss: Tensor
    key_loss: Tensor | None
    value_loss: Tensor | None
    key_layers: Tensor | None
    value_layers: Tensor | None


class TeacherStatistics(nn.Module):
    """Per-channel mean and per-layer standard deviation of the teacher's keys or values.

    Measured once before step 1 and kept: a statistic of the batch would make the loss depend on how it is split, one of
    the trained side could be lowered by shrinking.

    Attributes:
        mean: ``[L_t, H_t, D_t]`` buffer.
        scale: ``[L_t]`` buffer, standard deviation after the mean is taken out.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, teacher: KVShape) -> None:
        super().__init__()
        layers = teacher.num_hidden_layers
        self.register_buffer("mean", torch.zeros(layers, teacher.num_key_value_heads, teacher.head_dim))
        self.register_buffer("scale", torch.ones(layers))


def combine(parts: dict[str, tuple[Tensor, Tensor]]) -> AlignmentLoss:
    """Average the parts, ``"key"`` and ``"value"``, each a loss with a graph and losses per layer."""
    loss = torch.stack([part for part, _ in parts.values()]).mean()
    keys, values = parts.get("key"), parts.get("value")
    return AlignmentLoss(
        loss,
        None if keys is None else keys[0].detach(),
        None if values is None else values[0].detach(),
        None if keys is None else keys[1],
        None if values is None else values[1],
    )


PARTS = {"kv": ("key", "value"), "k": ("key",), "v": ("value",)}
