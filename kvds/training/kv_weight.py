"""KV weight: the factor of the KV loss over a run, where it starts, how it falls, how it is held, and its end."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvds.config import RunConfig
from kvds.distributed.process_group import all_reduce_sum

log = logging.getLogger("kvds")

GAIN = 0.5
"""Of the way to the weight that would have given the share asked for, on a logarithmic scale."""
LARGEST_CHANGE = 1.25
"""The weight changes by at most this factor at a logging step,"""
LARGEST_DRIFT = 100.0
"""and over the run by at most this one."""


def held_weight(weight: float, ratio: float, share: float, start: float) -> float:
    """The next weight of the KV loss under ``--kv_weight hold:SHARE``.

    ``weight · (share / ratio) ^ GAIN``, bounded per call and over the run; unchanged where the ratio says nothing. A
    weight that is still the start's, which was calibrated on another gradient, goes all the way at once.

    Args:
        weight: As it was when ``ratio`` was measured.
        ratio: ``‖KV gradient‖ / ‖all else‖`` at keys and values.
        share: What it should be.
        start: The weight that the run began with.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        return weight
    change = share / ratio
    if weight != start:
        change = min(max(change**GAIN, 1 / LARGEST_CHANGE), LARGEST_CHANGE)
    return min(max(weight * change, start / LARGEST_DRIFT), start * LARGEST_DRIFT)


class KVWeight:
    """The factor of the KV loss over a run, the same on all ranks; 0 before it has begun, where no keys and values are
    matched, and once it is let go.

    Args:
        cfg: The settings ``kv_weight…`` are read.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self._cfg = cfg
        self._value: float | Tensor = 0.0  # a scalar on the device where it is balanced
        self._start = 0.0
        self._until: int | None = None
        self._sums: Tensor | None = None

    @property
    def value(self) -> float:
        """The weight as it is now, without the schedule; waits for the device where it is balanced."""
        return float(self._value)

    @property
    def ended(self) -> int | None:
        """The step, counted from 0, from which on it is 0, whatever the schedule says; None: it is not let go."""
        return self._until

    def begin(self, calibrate: Callable[[float], float]) -> None:
        """Take the weight of a new run's first step; all ranks call it.

        Args:
            calibrate: From the share to the weight that gives it, 0 where none does; called unless a number was given.
        """
        cfg = self._cfg
        if not cfg.uses_kv:
            return
        if cfg.kv_weight_share is None:
            self._value = cfg.kv_weight_value or 0.0
        else:
            self._value = calibrate(cfg.kv_weight_share)
            log.info("kv_weight %s: calibrated to %.4g", cfg.kv_weight, self._value)
        self._start = self.value
        self._take(self._start)

    def _take(self, value: float) -> None:
        # In the form of later steps: a product of plain numbers is rounded otherwise.
        self._value = torch.tensor(value, dtype=torch.float32) if self._cfg.kv_weight_balanced else value

    def let_go(self, step: int) -> None:
        """Be 0 from ``step`` on."""
        self._until = step

    def part(self, step: int, total_steps: int) -> float:
        """What part of the weight the schedule leaves after ``step`` of ``total_steps`` optimizer steps."""
        last = self._cfg.kv_weight_until * total_steps
        if step >= last or (self._until is not None and step >= self._until):
            return 0.0
        return 1 - step / last if self._cfg.kv_weight_schedule == "linear" else 1.0

    def at(self, step: int, total_steps: int) -> float | Tensor:
        """The weight as the schedule leaves it after ``step`` of ``total_steps`` optimizer steps."""
        part = self.part(step, total_steps)
        return self._value * part if part else 0.0

    def hold(self, metrics: Mapping[str, float]) -> None:
        """Move the weight towards the share of the gradient under ``hold:SHARE``; otherwise leave it.

        Args:
            metrics: Means over ranks at a logging step; ``kv/gradient_ratio`` is read if it is there.
        """
        cfg = self._cfg
        if cfg.kv_weight_held and "kv/gradient_ratio" in metrics and self._until is None:
            share = cfg.kv_weight_share or 0.0
            self._value = held_weight(self.value, metrics["kv/gradient_ratio"], share, self._start)

    def note(self, metrics: Mapping[str, Tensor], share: float) -> None:
        """Under ``balance:SHARE`` add the losses of a micro-batch that is ``share`` of the step; reads no device.

        Args:
            metrics: Its own, as the module returns them.
            share: Of the step over all ranks.
        """
        if self._cfg.kv_weight_balanced and "loss/kv" in metrics:
            losses = share * torch.stack([other_losses(self._cfg, metrics), metrics["loss/kv"].float()])
            self._sums = losses if self._sums is None else self._sums + losses

    def end_step(self) -> None:
        """Under ``balance:SHARE`` take the next step's weight from the losses noted; all ranks call it."""
        if self._sums is not None:
            sums, self._sums = self._sums, None
            all_reduce_sum(sums)
            balanced = (self._cfg.kv_weight_share or 0.0) * sums[0] / sums[1]
            # A step that says nothing moves nothing: no position was selected, or a loss was not finite.
            told = torch.isfinite(balanced) & (balanced > 0)
            self._value = torch.where(told, balanced, torch.as_tensor(self._value).to(balanced.device))

    @property
    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"kv_weight": self.value, "start_kv_weight": self._start, "kv_let_go": self._until}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :attr:`state` of an earlier attempt, among other entries of its checkpoint."""
        self._start = state["start_kv_weight"]
        self._take(state["kv_weight"])
        self._until = state.get("kv_let_go")


def other_losses(cfg: RunConfig, metrics: Mapping[str, Tensor]) -> Tensor:
    """All that is trained on beside the KV loss, with its weights; 0 where a step has nothing beside it."""
    weights = (("task", cfg.task_weight), ("logit_kd", cfg.logit_kd_weight), ("handoff", cfg.handoff_weight))
    parts = [weight * metrics[f"loss/{name}"].float() for name, weight in weights if f"loss/{name}" in metrics]
    total = parts[0] if parts else torch.zeros_like(metrics["loss/kv"], dtype=torch.float32)
    for part in parts[1:]:
        total = total + part
    return total
