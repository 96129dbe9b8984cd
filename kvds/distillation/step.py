"""One micro-batch with all that the student's forward needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kvds.data.batches import TokenBatch
from kvds.data.labels import LabelledPositions
from kvds.handoff.continuation import Continuation
from kvds.kv import Selection, States
from kvds.models.own_logits import Head
from kvds.teacher.teacher import TeacherOutput


@dataclass(frozen=True)
class LossWeights:
    """Factors of the loss parts; ``kv`` may be a scalar on the device."""

    task: float = 1.0
    kv: float | Tensor = 0.0
    logit_kd: float = 0.0
    handoff: float = 0.0


class TeacherKV(NamedTuple):
    """One teacher's keys and values of a batch, and the positions that count."""

    states: States
    selection: Selection


@dataclass(frozen=True)
class StepInput:
    """One micro-batch with all that the student's forward needs. Tensors on the device of the student.

    Attributes:
        batch: Token ids, masks and the normalizers that make a sum over this rank's share of the global mean.
        labelled: Positions of ``batch`` whose next token counts.
        selection: Positions (or steps) whose keys and values count; None where none are matched.
        teacher: The teacher's output for this batch; None where nothing reads it.
        teacher_head: Its language-model head, for logit distillation.
        weights: Factors of the loss parts.
        sources: With several teachers, one call each that runs it on the batch: only one teacher's keys and values are
            there at a time. Then ``teacher`` and ``selection`` are None.
        continuation: Where prompts and answers go when the student writes from its teacher's cache; None without.
        sampled: Positions of ``batch`` whose next token the student wrote itself; None where no step has any.
        watch: Also measure the student's KV and the gradient that the KV loss sends back (logging steps).
    """

    batch: TokenBatch
    labelled: LabelledPositions
    selection: Selection | None
    teacher: TeacherOutput | None
    teacher_head: Head | None
    weights: LossWeights
    watch: bool = False
    sources: tuple[Callable[[], TeacherKV], ...] = ()
    continuation: Continuation | None = None
    sampled: LabelledPositions | None = None
