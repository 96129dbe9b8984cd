"""Calibration before step 1: an aligner's statistics and start from a few batches.

It sees the training data in training order and touches no weights of the student nor any state that training reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import deepspeed
from torch import nn

from kvds.align import KVAligner
from kvds.data.batches import TokenBatch
from kvds.distillation.calibration import attention_output_of_batch, fit_to_batches
from kvds.distributed.process_group import all_reduce_sum
from kvds.kv import Observed, Selection
from kvds.teacher.teacher import Teacher, TeacherOutput


def calibrate_aligner(
    aligner: KVAligner,
    student: nn.Module,
    batches: Callable[[], Iterable[TokenBatch]],
    match: Callable[[TokenBatch], tuple[TeacherOutput, Selection]],
    *,
    rope: str,
) -> dict[str, list[float]]:
    """Fill the aligner's statistics and its closed-form start, the same on all ranks; before the engine is built.

    Args:
        aligner: Not yet sharded.
        student: On its device; sharded by ZeRO-3 or whole. Its parameters are gathered for these forwards only.
        batches: Gives this rank's calibration batches, as often as it is called; equally many on every rank.
        match: From a batch to the teacher's output and the positions that count.
        rope: ``"pre"`` or ``"post"``.

    Returns:
        As :meth:`kvds.align.fitting.AlignmentMoments.apply`.
    """
    sharded = [p for p in student.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        return fit_to_batches(aligner, student, batches, match, rope=rope, all_reduce=all_reduce_sum)


def attention_output_at_start(
    aligner: KVAligner,
    student: nn.Module,
    teacher: Teacher,
    batch: TokenBatch,
    select: Callable[[TokenBatch, Observed | None], Selection],
    *,
    rope: str,
) -> dict[str, list[float]]:
    """The error of the attention output that the fitted maps start with, over all ranks; every rank calls it.

    Args:
        aligner: Fitted, not yet sharded.
        student: As for :func:`calibrate_aligner`.
        teacher: Replicated, of the row itself.
        batch: Of this rank.
        select: Positions that count.
        rope: ``"pre"`` or ``"post"``.

    Returns:
        As :meth:`kvds.align.attention_output.AttentionOutputError.result`.
    """
    sharded = [p for p in student.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        error = attention_output_of_batch(aligner, student, teacher, batch, select, rope=rope)
    if error is None:
        return {}
    for sums in error.sums:
        all_reduce_sum(sums)
    return error.result()
