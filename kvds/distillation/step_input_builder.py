"""Builder of a step's input, of a batch: labelled positions, the teacher's output, a selection."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from kvds.config import RunConfig
from kvds.data.batches import TokenBatch
from kvds.data.labels import LabelledPositions
from kvds.distillation.step import LossWeights, StepInput, TeacherKV
from kvds.handoff.continuation import Continuation
from kvds.teacher.cached import CachedTeacher
from kvds.teacher.teacher import Teacher
from kvds.teacher.token_selection import TokenChoice


class StepInputBuilder:
    """Runs the teacher on a batch and makes the student's input.

    Args:
        cfg: The run.
        teachers: None, one or several.
        choice: Which positions are matched.
        device: Of the student.

    Attributes:
        matching: Whether training still matches keys and values; False once it has given them up.
    """

    def __init__(
        self, cfg: RunConfig, teachers: Sequence[Teacher | CachedTeacher], choice: TokenChoice, device: torch.device
    ) -> None:
        self._cfg, self._teachers, self._choice, self._device = cfg, teachers, choice, device
        self.matching = cfg.uses_kv

    @property
    def reads_keys_and_values(self) -> bool:
        """Whether steps ask the teacher for keys and values: to match them, or to write from them."""
        return self.matching or self._cfg.handoff_weight > 0

    def __call__(
        self, batch: TokenBatch, weights: LossWeights | None = None, *, watch: bool = False, step: int = 0,
        match: bool | None = None,
    ) -> StepInput:  # fmt: skip
        """The input for one micro-batch; a function of the batch and ``step`` alone.

        Args:
            batch: On the CPU.
            weights: Factors of the loss parts; None: the task's alone.
            watch: As of :class:`kvds.distillation.step.StepInput`.
            step: Optimizer step, which random selections depend on.
            match: Whether keys and values are matched; None: as :attr:`matching` says.
        """
        match = self.matching if match is None else match
        for teacher in () if self.reads_keys_and_values else self._teachers:
            if isinstance(teacher, CachedTeacher):
                teacher.drop_ahead()  # here, at each step: the thread that reads may be behind
        weights = LossWeights() if weights is None else weights
        continuation = Continuation.from_batch(batch).to(self._device) if self._cfg.handoff_weight else None
        labelled = LabelledPositions.from_labels(batch.labels).to(self._device)
        sampled = None
        if batch.sampled_labels is not None:
            sampled = LabelledPositions.from_labels(batch.sampled_labels).to(self._device)
        batch = batch.to(self._device)
        if self._cfg.teacher_names:
            if not match:
                return StepInput(batch, labelled, None, None, None, weights, watch, sampled=sampled)
            sources = tuple(partial(self._source, teacher, batch, step) for teacher in self._teachers)
            return StepInput(batch, labelled, None, None, None, weights, watch, sources, sampled=sampled)
        output, selection, head = None, None, None
        if self._teachers:
            [teacher] = self._teachers
            if match:
                output, selection = self._choice.with_teacher(teacher, batch, step)
            elif self._cfg.logit_kd_weight or self._cfg.handoff_weight:
                output = teacher(batch)
            head = teacher.head if self._cfg.logit_kd_weight else None
        return StepInput(
            batch, labelled, selection, output, head, weights, watch, continuation=continuation, sampled=sampled
        )

    def _source(self, teacher: Teacher | CachedTeacher, batch: TokenBatch, step: int) -> TeacherKV:
        output, selection = self._choice.with_teacher(teacher, batch, step)
        assert output.states is not None
        return TeacherKV(output.states, selection)
