"""KV weight: the factor of the KV loss over a run, where it starts, how it falls and how it is held."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from kvds.config import RunConfig

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
    """The factor of the KV loss over a run: a plain number, the same on all ranks; 0 before it has begun, and where no
    keys and values are matched.

    Args:
        cfg: ``--kv_weight`` and ``--kv_weight_schedule`` are read.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self._cfg = cfg
        self._value = self._start = 0.0

    @property
    def value(self) -> float:
        """The weight as it is now, without the schedule."""
        return self._value

    def begin(self, calibrate: Callable[[float], float]) -> None:
        """Take the weight of a new run's first step; all ranks call it.

        Args:
            calibrate: From the share of the gradient to the weight that gives it; called under ``auto:SHARE`` and
                ``hold:SHARE`` only.
        """
        cfg = self._cfg
        if not cfg.uses_kv:
            return
        if cfg.kv_weight_share is None:
            self._value = cfg.kv_weight_value or 0.0
        else:
            self._value = calibrate(cfg.kv_weight_share)
            log.info("kv_weight %s: calibrated to %.4g", cfg.kv_weight, self._value)
        self._start = self._value

    def at(self, step: int, total_steps: int) -> float:
        """The weight as the schedule leaves it after ``step`` of ``total_steps`` optimizer steps."""
        return self._value * (1 - step / total_steps) if self._cfg.kv_weight_schedule == "linear" else self._value

    def part_of(self, scheduled: float) -> float:
        """What part of the weight ``scheduled`` is, a result of :meth:`at`; 1 where the weight is 0."""
        return scheduled / self._value if self._value else 1.0

    def hold(self, metrics: Mapping[str, float]) -> None:
        """Move the weight towards the share of the gradient under ``hold:SHARE``; otherwise leave it.

        Args:
            metrics: Means over ranks at a logging step; ``kv/gradient_ratio`` is read if it is there.
        """
        cfg = self._cfg
        if cfg.kv_weight_held and "kv/gradient_ratio" in metrics:
            share = cfg.kv_weight_share or 0.0
            self._value = held_weight(self._value, metrics["kv/gradient_ratio"], share, self._start)

    @property
    def state(self) -> dict[str, float]:
        """Plain values for a checkpoint."""
        return {"kv_weight": self._value, "start_kv_weight": self._start}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :attr:`state` of an earlier attempt, among other entries of its checkpoint."""
        self._value, self._start = state["kv_weight"], state["start_kv_weight"]
