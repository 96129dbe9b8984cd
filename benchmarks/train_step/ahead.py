"""The inputs of steps whose teacher runs ahead or does not, so that one step of either kind does equal work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.train_step.workbench import Clock
from kvds.data.batches import TokenBatch
from kvds.distillation.step import LossWeights, StepInput
from kvds.training.input_feed import InputFeed, MicroBatch


class InputTurns:
    """Makes the input of one step after the other.

    With ``ahead`` a step finds its input made, and makes another of the same batch in place of the next batch's: as
    much work as a step without. It ends when both streams are done, as the next student would wait for its teacher
    there.

    Args:
        make: From a batch on the CPU to the student's input.
        clock: Gets ``teacher``: with ``ahead``, the time that the student's stream waits.
        weights: Of the loss parts.
        device: Of both models.
        ahead: As of :class:`kvds.training.input_feed.InputFeed`.
    """

    def __init__(
        self, make: Callable[[TokenBatch], StepInput], clock: Clock, weights: LossWeights, *, device: torch.device,
        ahead: bool,
    ) -> None:  # fmt: skip
        self._queue, self._weights, self._ahead, self._device = deque[TokenBatch](), weights, ahead, device
        self._prepared = False
        phases: Any = SimpleNamespace(
            phase=lambda name: nullcontext() if name == "teacher_ahead" else clock.phase("teacher")
        )
        self._feed = InputFeed(self._batches(), lambda micro: make(micro.batch), phases, device=device, ahead=ahead)

    def _batches(self) -> Iterator[MicroBatch]:
        while True:
            yield MicroBatch(0, 0, self._queue.popleft())

    def prepare(self, batch: TokenBatch) -> None:
        """What the step before this one would have done for it; returns when the device has."""
        self.run_ahead(batch)
        self._prepared = self._ahead
        if self._ahead and self._device.type == "cuda":
            torch.cuda.synchronize()

    def take(self, batch: TokenBatch) -> StepInput:
        """The input of this step."""
        if not self._prepared:
            self._queue.append(batch)
        self._prepared = False
        return self._feed.take(self._weights, watch=False)[1]

    def run_ahead(self, batch: TokenBatch) -> None:
        """With ``ahead``, start to make the next input."""
        if self._ahead:
            self._queue.append(batch)
            self._feed.make_next()

    def end(self) -> None:
        """Wait for the input made ahead, and let it go."""
        self._feed.drop()
