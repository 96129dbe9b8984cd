"""The inputs of steps whose teacher runs ahead or does not: of many steps as in training, and of one step by itself, so
that one of either kind does equal work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.train_step.workbench import Clock
from kvds.data.batches import TokenBatch
from kvds.data.read_ahead import ReadAhead
from kvds.distillation.step import LossWeights, StepInput
from kvds.teacher.cached import CachedTeacher
from kvds.teacher.teacher import Teacher
from kvds.training.input_feed import InputFeed, MicroBatch, make_ready, micro_batches


def _phases(clock: Clock) -> Any:
    """What a feed times, as ``teacher``: with a teacher ahead, the time that the student's stream waits."""
    return SimpleNamespace(phase=lambda name: nullcontext() if name == "teacher_ahead" else clock.phase("teacher"))


def copied_ahead(teacher: Teacher | CachedTeacher | None, device: torch.device) -> bool:
    """Whether training copies what this teacher has stored beside the student
    (:meth:`kvds.config.all_settings.AllSettings.teacher_ahead`).
    """
    return isinstance(teacher, CachedTeacher) and device.type == "cuda"


@contextmanager
def running_feed(
    build: Callable[[int], list[TokenBatch]],
    steps: int,
    make: Callable[[TokenBatch], StepInput],
    teacher: Teacher | CachedTeacher | None,
    clock: Clock,
    device: torch.device,
) -> Iterator[InputFeed]:
    """The inputs of ``steps`` steps one after the other: batches, and what a cache holds for them, read ahead by
    threads as ``kvds.training.run`` does it.

    Args:
        build: From a step to its micro-batches on the CPU; called by a thread.
        steps: Their number.
        make: From a batch on the CPU to the student's input.
        teacher: That ``make`` asks; None: none.
        clock: Gets ``teacher``.
        device: Of both models.
    """
    teachers = [] if teacher is None else [teacher]
    with ReadAhead(lambda step: make_ready(build(step), teachers, device), range(steps)) as read:
        ordered = micro_batches(read.take, range(steps), seed=0, rank=0, world_size=1)
        ahead = copied_ahead(teacher, device)
        yield InputFeed(ordered, lambda micro: make(micro.batch), _phases(clock), device=device, ahead=ahead)


class InputTurns:
    """Makes the input of one step after the other.

    With ``ahead`` a step finds its input made, and makes another of the same batch in place of the next batch's: as
    much work as a step without. It ends when both streams are done, as the next student would wait for its teacher
    there. What a cache holds for a step has been read before it, and is read once more beside it.

    Args:
        make: From a batch on the CPU to the student's input.
        clock: Gets ``teacher``: with ``ahead``, the time that the student's stream waits.
        weights: Of the loss parts.
        device: Of both models.
        ahead: As of :class:`kvds.training.input_feed.InputFeed`.
        cache: Where ``make`` finds the teacher's keys and values, if not with the teacher.
    """

    def __init__(
        self, make: Callable[[TokenBatch], StepInput], clock: Clock, weights: LossWeights, *, device: torch.device,
        ahead: bool, cache: CachedTeacher | None = None,
    ) -> None:  # fmt: skip
        self._cache = cache
        self._queue, self._weights, self._ahead, self._device = deque[TokenBatch](), weights, ahead, device
        self._prepared = False
        self._feed = InputFeed(
            self._batches(), lambda micro: make(micro.batch), _phases(clock), device=device, ahead=ahead
        )

    def _batches(self) -> Iterator[MicroBatch]:
        while True:
            yield MicroBatch(0, 0, self._queue.popleft())

    def prepare(self, batch: TokenBatch) -> None:
        """What the step before this one would have done for it; returns when the device has."""
        if self._cache is not None:
            self._cache.drop_ahead()  # what the last step read beside it, perhaps of another batch
            for _ in range(1 + self._ahead):
                self._cache.read_ahead(batch)
        self.run_ahead(batch)
        if self._cache is not None:
            self._cache.settle()
        self._prepared = self._ahead
        if self._ahead and self._device.type == "cuda":
            torch.cuda.synchronize()

    def take(self, batch: TokenBatch) -> StepInput:
        """The input of this step."""
        if self._cache is not None:
            self._cache.read_ahead(batch)
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
