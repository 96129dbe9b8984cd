"""A plain copy of the student on each rank, which generates alone: no layer of it gathers weights, and no rank has to
go on for another that has more to write.
"""

from __future__ import annotations

import copy
from typing import Any

import deepspeed
import torch
from torch import nn

from kvds.checkpoint.export import plain_architecture
from kvds.models.adapters import adapters_of, add_adapters


class StudentCopy:
    """A transformers model of its own that takes over the student's weights when it is asked to.

    It has the weights once more in the compute precision, attention that takes a cache and a mask, no capture, no
    compiled piece and no dropout. Adapters stay beside what they adapt.

    Args:
        student: In the engine's module; whole on this rank, or in ZeRO-3's shards.
        device: Of this rank.

    Attributes:
        model: The copy, in evaluation mode, without gradient.
    """

    def __init__(self, student: Any, device: torch.device) -> None:
        self._student = student
        dtype = next(student.parameters()).dtype
        self.model: Any = plain_architecture(student.config, dtype)
        self.model.config.use_cache = True
        self.model.generation_config = copy.deepcopy(student.generation_config)
        if (adapters := adapters_of(student)) is not None:
            add_adapters(self.model, adapters, seed=0)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.model.to(device).requires_grad_(False).eval()
        self._fresh = True

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights as they are now: the first time all, later those that train. All ranks call it."""
        own, theirs = (dict(model.named_parameters()) for model in (self.model, self._student))
        if own.keys() != theirs.keys():
            raise RuntimeError(f"the student's copy has other weights: {sorted(own.keys() ^ theirs.keys())[:3]}")
        for name, parameter in theirs.items():
            if self._fresh or parameter.requires_grad:
                self._take(own[name], parameter)
        if self._fresh:
            buffers = dict(self._student.named_buffers())
            for name, buffer in self.model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        self._fresh = False

    def _take(self, own: nn.Parameter, parameter: nn.Parameter) -> None:
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            own.copy_(parameter)
