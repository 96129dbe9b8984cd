"""Floating point operations of an epoch, and bytes on disk."""

from __future__ import annotations

from dataclasses import dataclass

from kvds.align import ALIGNERS
from kvds.config import RunConfig
from kvds.kv import KVShape
from kvds.plan.handoff import map_flops
from kvds.plan.rows import RowPlan
from kvds.plan.states import ModelSize


@dataclass(frozen=True)
class Work:
    """FLOPs of an epoch over all ranks, a multiply and an add as two.

    Attributes:
        student: Forward, backward and recomputation, also of answers that are written over a cache.
        teacher: Forward.
        aligner: Forward and backward, also of the map that makes that cache.
    """

    student: float
    teacher: float
    aligner: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.student + self.teacher + self.aligner


def _attention(shape: KVShape, tokens: int) -> float:
    """FLOPs per token of scores and weighted sum, whole rows (a padding mask hides the causal half from no kernel)."""
    return 4.0 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * tokens


def aligner_flops(cfg: RunConfig, student: KVShape, teacher: KVShape, slots: int) -> float:
    """FLOPs per compared position of a row with ``slots`` of them, forward and backward."""
    return ALIGNERS[cfg.alignment_mode].flops_per_position(student, teacher, cfg, slots) if cfg.uses_kv else 0.0


def epoch_work(
    cfg: RunConfig,
    rows: RowPlan,
    student: tuple[ModelSize, KVShape],
    teacher: tuple[ModelSize, KVShape] | None,
) -> Work | None:
    """FLOPs of one epoch, or None where the rows are unknown."""
    if rows.padded_tokens is None or rows.labelled_tokens is None:
        return None
    tokens, labelled = rows.padded_tokens, rows.labelled_tokens
    length = rows.largest.tokens
    size, shape = student
    once = 2 if cfg.uses_adapters else 3  # of frozen weights no gradient is computed
    passes = once + int(cfg.gradient_checkpointing)
    students = passes * tokens * (2.0 * size.backbone + _attention(shape, length)) + once * 2.0 * size.head * labelled
    over = rows.largest.handed + rows.largest.follow
    if cfg.handoff_weight and rows.followed_tokens is not None:
        students += once * rows.followed_tokens * (2.0 * size.backbone + _attention(shape, over))
        students += once * 2.0 * size.head * labelled
    teachers = aligners = 0.0
    if teacher is not None:
        size, teacher_shape = teacher
        teachers = tokens * (2.0 * size.backbone + _attention(teacher_shape, length))
        if cfg.logit_kd_weight:
            teachers += 2.0 * size.head * labelled
        slots = rows.largest.slots
        aligners = aligner_flops(cfg, shape, teacher_shape, slots) * tokens * slots / length
        aligners += map_flops(cfg, teacher_shape, shape) * (rows.handed_tokens or 0)
    return Work(students, teachers, aligners)


def checkpoint_bytes(cfg: RunConfig, count: int, stage: int, element: int, *, frozen: int = 0) -> int:
    """One DeepSpeed checkpoint, all ranks' files: fp32 weights, the optimizer's moments; below stage 3 the model, too.

    Args:
        cfg: The run.
        count: Trained parameters.
        stage: Of ZeRO.
        element: Bytes of a weight.
        frozen: Parameters that no optimizer moves, which are there as they are.
    """
    return count * (4 * (3 if cfg.optimizer == "adamw" else 1) + (element if stage < 3 else 0)) + element * frozen


def disk_bytes(cfg: RunConfig, checkpoint: int, student: int, steps: int) -> int:
    """What the output folder of a run of ``steps`` steps grows to: its checkpoints and the exported student."""
    saved = 1 + ((steps - 1) // cfg.save_steps if cfg.save_steps else 0)
    if cfg.keep_checkpoints:  # an old one goes when the new one is whole
        saved = min(saved, cfg.keep_checkpoints + 1)
    return saved * checkpoint + student
