"""Memory of a run with several teachers: their weights are there together, their keys and values one after the other.

Each teacher runs within the student's forward pass, when the student's activations are alive, and its keys and values
go once its loss is there; the gradients that the loss has left for the backward pass stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from kvds.align import AlignerGroup
from kvds.config import RunConfig
from kvds.distillation.step import StepInput, TeacherKV
from kvds.plan.batch_shape import BatchShape
from kvds.plan.estimate import Machine, RunPlan
from kvds.plan.rows import RowPlan
from kvds.plan.states import ModelSize, state_memory
from kvds.plan.step import StepPlanner
from kvds.plan.work import checkpoint_bytes


class SeveralTeachersPlanner(StepPlanner):
    """Plans micro-batches in which several teachers run.

    Args:
        planners: Those of runs with one of the teachers each.
        gathered: Bytes of whole parameters of each teacher while it runs.
    """

    def __init__(self, planners: Sequence[StepPlanner], gathered: Sequence[int]) -> None:
        first = planners[0]
        super().__init__(first.cfg, first.student, first.teacher, first.dtype, first.device)
        self._planners, self._gathered = planners, gathered
        self._forwards: list[int] = []

    def peak(self, batch: BatchShape, *, checkpointing: bool) -> int:
        """The most bytes of a micro-batch of ``batch`` at once, whole parameters of a teacher that runs included."""
        own = [planner._teacher_forward(batch) for planner in self._planners]
        self._forwards = [forward + gathered for forward, gathered in zip(own, self._gathered, strict=True)]
        return super().peak(batch, checkpointing=checkpointing)

    def _teacher_output(self, batch: BatchShape) -> int:
        return 0  # no more than one teacher's is there, and it counts where the student's forward calls for it

    def _aligner(self, student: PreTrainedConfig, batch: BatchShape) -> Any:
        members = [planner._aligner(student, batch) for planner in self._planners]
        return AlignerGroup(members, [1.0] * len(members))

    def _inputs(self, batch: BatchShape, aligned: bool, handed: bool = False) -> StepInput:
        inputs = super()._inputs(batch, aligned, handed)
        if not aligned:
            return inputs
        sources = [
            partial(_teacher_kv, planner, batch, forward)
            for planner, forward in zip(self._planners, self._forwards, strict=True)
        ]
        return replace(inputs, teacher=None, selection=None, sources=tuple(sources))


def _teacher_kv(planner: StepPlanner, batch: BatchShape, forward: int) -> TeacherKV:
    """One teacher's keys and values, made beside ``forward`` bytes that are gone when it returns."""
    inputs = planner._inputs(batch, aligned=True)
    torch.empty(forward, dtype=torch.uint8)
    assert inputs.teacher is not None and inputs.teacher.states is not None and inputs.selection is not None
    return TeacherKV(inputs.teacher.states, inputs.selection)


class SeveralTeachersPlan:
    """What a run with ``teacher_names`` takes.

    Args:
        cfg: The run.
        machine: Where it will be.
        rows: Its batches.

    Attributes:
        plans: Of runs with one of the teachers each.
        student_size: Parameters of the student.
        element: Bytes of a weight.
    """

    def __init__(self, cfg: RunConfig, machine: Machine, rows: RowPlan) -> None:
        self.cfg, self.machine = cfg, machine
        alone = [replace(cfg, teacher_names=(), teacher_weights=(), teacher_name=name) for name in cfg.teacher_names]
        self.plans = [RunPlan(one, machine, rows) for one in alone]
        self.student_size, self.element = self.plans[0].student_size, self.plans[0].element

    @property
    def teacher_sizes(self) -> list[ModelSize]:
        """Parameters of the teachers."""
        return [plan.teacher_size for plan in self.plans if plan.teacher_size is not None]

    @cached_property
    def aligner_parameters(self) -> int:
        """Learned numbers of all aligners."""
        return sum(plan.aligner_parameters for plan in self.plans)

    @cached_property
    def peak(self) -> int:
        """Bytes per GPU (or process) at the worst moment: in a micro-batch, or in the optimizer's step."""
        states = [
            state_memory(
                plan.cfg, plan.raw, student=plan.student_size, aligner=self.aligner_parameters,
                teacher=plan.teacher_size, element=plan.element, ranks=self.machine.ranks, device=self.machine.device,
            )
            for plan in self.plans
        ]  # fmt: skip
        gathered = [one.teacher_gathered for one in states]
        planner = SeveralTeachersPlanner([plan.planner for plan in self.plans], gathered)
        step = planner.peak(self.plans[0].rows.largest, checkpointing=self.cfg.gradient_checkpointing)
        held = states[0].held + sum(one.teacher for one in states[1:])
        return held + max(states[0].gathered + step, states[0].update)

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint, in which no teacher is."""
        size, stage = self.student_size, self.plans[0].raw["zero_optimization"]["stage"]
        trained, frozen = size.trained + self.aligner_parameters, size.total - size.trained
        return checkpoint_bytes(self.cfg, trained, stage, self.element, frozen=frozen)

    @property
    def fits(self) -> bool:
        """Whether the recipe as it stands does."""
        return self.peak <= self.machine.usable

    def advice(self) -> list[str]:
        """None: which change is the cheapest is known of runs with one teacher."""
        return []
