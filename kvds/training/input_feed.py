"""The inputs of a run's micro-batches in order; on request the teacher runs one ahead, beside the student.

On a GPU the next micro-batch's copy to the device, its selection and its teacher's forward go to a stream of their own
(of a teacher on disk the copy of what is stored, which would hold up the student as long as a part of its forward):

    main   forward m │ backward m │ optimizer │ wait │ forward m+1 │ …
    side     … teacher m+1 ·················· ┘        teacher m+2 …

Memory of that stream is handed out by the host before it is used, in a pool of its own. What of it the main stream
reads stays alive until the next input is taken, and the side stream writes over it only after the main one has come
there: no tensor has to be recorded on another stream, and no more than two micro-batches of the teacher's keys and
values are there at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from kvds.data.batches import TokenBatch
from kvds.distillation.step import LossWeights, StepInput
from kvds.teacher.cached import CachedTeacher
from kvds.teacher.teacher import Teacher
from kvds.training.meters import PhaseTimer


@dataclass(frozen=True)
class MicroBatch:
    """One rank's part of an optimizer step.

    Attributes:
        step: Optimizer step, counted from 0.
        seed: Of all draws made for it.
        batch: On the CPU.
        number: Of the rank's micro-batches of that step, counted from 0.
        count: Micro-batches of that step on each rank.
    """

    step: int
    seed: int
    batch: TokenBatch
    number: int = 0
    count: int = 1

    @property
    def last(self) -> bool:
        """Whether the optimizer steps after it."""
        return self.number + 1 == self.count

    @property
    def tokens(self) -> int:
        """Real tokens; 0 where all rows are padding."""
        return int(self.batch.attention_mask.sum()) if int(self.batch.sample_ids.max()) >= 0 else 0


def micro_batches(
    batches_of: Callable[[int], list[TokenBatch]], steps: range, *, seed: int, rank: int, world_size: int
) -> Iterator[MicroBatch]:
    """The micro-batches of ``steps`` on one rank, each step asked of ``batches_of`` when its first is."""
    for step in steps:
        batches = batches_of(step)
        for number, batch in enumerate(batches):
            # A function of seed, step and rows: a resumed run draws the same dropout masks, on another number of ranks,
            # too.
            share = number * world_size + rank
            yield MicroBatch(step, (seed * 1_000_003 + step) * 4099 + share, batch, number, len(batches))


def make_ready(
    batches: list[TokenBatch], teachers: Sequence[Teacher | CachedTeacher], device: torch.device
) -> list[TokenBatch]:
    """A step's micro-batches, ready to be copied to the device; what a cache holds for them is being read."""
    for teacher in teachers:
        if isinstance(teacher, CachedTeacher):
            for batch in batches:
                teacher.read_ahead(batch)
    return [batch.pin_memory() for batch in batches] if device.type == "cuda" else batches


class InputFeed:
    """What the student is given, one micro-batch after the other.

    The random state is the micro-batch's own when its teacher runs and again when the input is handed out, so that it
    makes no difference to the student's draws what ran before.

    Args:
        micro_batches: In order.
        make: From a micro-batch to its input, whatever the loss's weights.
        timer: Gets ``teacher``; with ``ahead`` in its place ``teacher_ahead``, which on a GPU passes beside the other
            phases, and ``teacher_wait``, for which it holds up the student.
        device: Of the student and the teacher.
        ahead: Make the next input in :meth:`make_next`, not when it is taken.
    """

    def __init__(
        self,
        micro_batches: Iterator[MicroBatch],
        make: Callable[[MicroBatch], StepInput],
        timer: PhaseTimer,
        *,
        device: torch.device,
        ahead: bool = False,
    ) -> None:
        self._micro_batches, self._make, self._timer, self._ahead = micro_batches, make, timer, ahead
        self._made: tuple[MicroBatch, StepInput] | None = None
        self._held: StepInput | None = None
        self._stream: torch.cuda.Stream | None = None
        self._room: torch.cuda.Event | None = None
        if ahead and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream())  # on which the teacher's weights were written

    def take(self, weights: LossWeights, *, watch: bool) -> tuple[MicroBatch, StepInput]:
        """The next micro-batch and its input, for the current stream, with its random state set.

        Args:
            weights: Factors of the loss parts.
            watch: As of :class:`kvds.distillation.step.StepInput`.
        """
        if self._ahead:
            self.make_next()
            with self._timer.phase("teacher_wait"):
                self._await()
            assert self._made is not None
            (micro, inputs), self._made = self._made, None
            self._held = inputs
        else:
            micro = next(self._micro_batches)
            with self._timer.phase("teacher"):
                inputs = self._seeded(micro)
        torch.manual_seed(micro.seed)
        return micro, replace(inputs, weights=weights, watch=watch)

    def make_next(self) -> None:
        """With ``ahead``, make the next input if there is one and it is not there; returns before the device has."""
        if not self._ahead or self._made is not None:
            return
        micro = next(self._micro_batches, None)
        if micro is None:
            return
        if self._room is not None and self._stream is not None:
            self._stream.wait_event(self._room)
        own = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with own, self._timer.phase("teacher_ahead"):
            self._made = micro, self._seeded(micro)

    def drop(self) -> None:
        """Let go of what has been made ahead and of the last input's memory."""
        if self._ahead:
            self._await()
        self._made = self._held = None

    def _await(self) -> None:
        """Let the current stream wait for the input made, and mark where it is done with the one before."""
        if self._stream is not None:
            main = torch.cuda.current_stream()
            self._room = main.record_event()
            main.wait_stream(self._stream)

    def _seeded(self, micro: MicroBatch) -> StepInput:
        torch.manual_seed(micro.seed)
        return self._make(micro)
