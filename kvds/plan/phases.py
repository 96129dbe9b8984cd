"""Phases of a run beside its training steps: what calibration and evaluation take, each at its worst moment."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kvds.align import build_aligner
from kvds.align.fitting import AlignmentMoments
from kvds.align.mix_fitting import MixFitting
from kvds.kv import KVShape
from kvds.models.own_logits import EVALUATED_LOGITS
from kvds.plan.batch_shape import BatchShape, kv_bytes
from kvds.plan.estimate import RunPlan
from kvds.plan.handoff import map_fitting_bytes
from kvds.plan.live_memory import LiveMemory

CALIBRATED_ALIGNER, CALIBRATED_WEIGHT = "calibration of the aligner", "calibration of --kv_weight"
CALIBRATED_MAP = "start of the handoff's map"
TRAINING, LOSSES, GENERATION = "training", "evaluation, logits", "evaluation, generation"
WRITING = "completions of --on_policy_share"
_FP32 = 4
# Of each entry of a distribution that is drawn from: in fp32, sorted, in sums, as logarithms.
_SCORES_BYTES = 64
_WHOLE = "each GPU holds a whole student then"
_MORE = "expected more memory on each GPU, or a smaller batch_size"
_REMEDIES = {
    CALIBRATED_ALIGNER: f"{_WHOLE}, and its states beside the teacher's; {_MORE}",
    CALIBRATED_MAP: f"{_WHOLE}, and sums over products of channels; {_MORE} or handoff_source_layers",
    CALIBRATED_WEIGHT: "expected what makes training fit",
    WRITING: f"{_WHOLE}, and the cache of 4 × batch_size rows; {_MORE} or max_length",
    LOSSES: f"{_WHOLE}, and the logits of 4 × batch_size rows; {_MORE}",
    GENERATION: f"{_WHOLE}, and its cache of 4 × batch_size rows; {_MORE} or max_new_tokens",
}


class Phases:
    """The phases of a planned run.

    Args:
        plan: Of the run.

    Attributes:
        peaks: Phase → bytes per GPU at its worst moment, training among them, in the order in which a run comes to
            them.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._plan, cfg = plan, plan.cfg
        self.peaks: dict[str, int] = {}
        if cfg.uses_kv and plan.planner.teacher_shape is not None:
            self.peaks[CALIBRATED_ALIGNER] = _calibrated_aligner(plan)
        if cfg.handoff_weight:
            self.peaks[CALIBRATED_MAP] = _calibrated_map(plan)
        if cfg.uses_kv and plan.planner.teacher_shape is not None and cfg.kv_weight_share is not None:
            self.peaks[CALIBRATED_WEIGHT] = _calibrated_weight(plan)
        if cfg.on_policy_share:
            self.peaks[WRITING] = _writing(plan)
        self.peaks |= {TRAINING: plan.peak, LOSSES: _losses(plan), GENERATION: _generation(plan)}

    @property
    def largest(self) -> str:
        """The phase that takes the most."""
        return max(self.peaks, key=self.peaks.__getitem__)

    @property
    def tight(self) -> dict[str, str]:
        """Phases other than training that each GPU has no room for, and what would make them fit."""
        room = self._plan.machine.usable
        return {name: _REMEDIES[name] for name, peak in self.peaks.items() if name != TRAINING and peak > room}


def _calibrated_aligner(plan: RunPlan) -> int:
    """Before the engine is built: the student whole on each rank, no optimizer; its states stay for the teacher's."""
    left, peak = plan.planner.read_student(plan.rows.largest)
    teaching = plan.states().teacher_gathered + plan.step.teacher_forward
    beside = left + plan.step.teacher_kv + max(teaching, fitting_bytes(plan, plan.rows.largest))
    return _before_the_engine(plan) + max(peak, beside)


def _before_the_engine(plan: RunPlan) -> int:
    """Held then: the teacher as placed, a whole student, aligner and map."""
    student = plan.element * plan.student_size.total
    if plan.raw["zero_optimization"]["stage"] == 3 and plan.cfg.student_init == "pretrained":
        student += -(-student // plan.machine.ranks)  # loaded in shards, gathered for the forwards
    return plan.states().teacher + student + _FP32 * (plan.aligner_parameters + plan.map_parameters)


def _calibrated_map(plan: RunPlan) -> int:
    """Likewise; the student's states are copied once, without padding, and the fitted map lies beside the one that
    starts as it.
    """
    teacher, batch = plan.planner.teacher_shape, plan.rows.largest
    assert teacher is not None
    left, peak = plan.planner.read_student(batch, "kv")
    teaching = plan.states().teacher_gathered + plan.step.teacher_forward
    fitting = map_fitting_bytes(plan.cfg, teacher, plan.planner.student_shape, batch, plan.element)
    beside = left + plan.step.teacher_kv + max(teaching, fitting)
    return _before_the_engine(plan) + _FP32 * plan.map_parameters + max(peak, 2 * left, beside)


def fitting_bytes(plan: RunPlan, batch: BatchShape) -> int:
    """What the statistics of ``batch`` take, for layer mixes or for maps: its selected rows, a chunk in fp64, sums."""
    memories = LiveMemory(plan.machine.device), LiveMemory(plan.machine.device)
    planner = plan.planner
    assert planner.teacher_shape is not None
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        aligner = build_aligner(planner.student_shape, planner.teacher_shape, plan.cfg)
        positions = batch.rows * batch.slots
        seen = [aligner.seen_shape(shape) for shape in (planner.student_shape, planner.teacher_shape)]
        halves = torch.zeros(positions, dtype=torch.int64)
        passes: tuple[type[MixFitting | AlignmentMoments], ...] = (MixFitting, AlignmentMoments)
        for memory, moments in zip(memories, passes, strict=True):
            with memory:
                for part in moments(aligner).parts.values():
                    student, teacher = (_rows(shape, positions, plan.dtype) for shape in seen)
                    source, target = map(torch.stack, part.sides(student, teacher))
                    part.add_states(source, target, halves)
    return max(memory.peak for memory in memories)


def _rows(shape: KVShape, positions: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    size = (positions, shape.num_key_value_heads, shape.head_dim)
    return tuple(torch.empty(size, dtype=dtype) for _ in range(shape.num_hidden_layers))


def _calibrated_weight(plan: RunPlan) -> int:
    """A micro-batch's forward and backward pass as in training, no optimizer step, nothing ahead."""
    states, step = plan.states(), plan.step
    teaching = states.teacher_gathered + step.teacher_forward + step.teacher_kv
    return states.held + max(states.gathered + step.peak - step.teacher_ahead, teaching)


def _beside_evaluation(plan: RunPlan) -> int:
    """Held all the while: the run, a plain copy of the student, and what a teacher ahead has left."""
    ahead = plan.step.teacher_kv if plan.step.teacher_ahead else 0
    return plan.states().held + plan.element * plan.student_size.total + ahead


def _judged(plan: RunPlan) -> BatchShape:
    """Four micro-batches of the longest rows."""
    rows = 4 * plan.cfg.batch_size
    return BatchShape(rows, plan.cfg.max_length, rows * plan.rows.row_labelled, 0)


def _losses(plan: RunPlan) -> int:
    """Cross entropy of four micro-batches: the backbone's forward, then logits, these in fp32, and their logarithms."""
    batch = _judged(plan)
    logits = min(EVALUATED_LOGITS, batch.labelled * plan.student_config.vocab_size)
    hidden = plan.element * batch.rows * batch.tokens * plan.planner.student_shape.hidden_size
    head = hidden + logits * (2 * _FP32 + (plan.element if plan.element < _FP32 else 0))
    return _beside_evaluation(plan) + max(plan.planner.evaluation_forward(batch), head)


def _generation(plan: RunPlan) -> int:
    """A cache of four micro-batches, as long as rows and completions get."""
    batch = _judged(plan)
    longest = replace(batch, tokens=batch.tokens + plan.cfg.max_new_tokens)
    return _beside_evaluation(plan) + kv_bytes(plan.planner.student_shape, longest, plan.element)


def _writing(plan: RunPlan) -> int:
    """The student's copy, which is held all the while, with a cache of four micro-batches of whole rows."""
    batch = _judged(plan)
    scores = _SCORES_BYTES * batch.rows * plan.student_config.vocab_size
    cache = kv_bytes(plan.planner.student_shape, batch, plan.element)
    return plan.states().held + cache + max(scores, plan.planner.evaluation_forward(batch))
