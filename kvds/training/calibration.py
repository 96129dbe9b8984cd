"""Calibration before step 1: an aligner's statistics and start from a few batches.

It sees the training data in training order and touches no weights of the student nor any state that training reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import deepspeed
import torch
from torch import Tensor, nn

from kvds.align import KVAligner
from kvds.align.fitting import AlignmentMoments
from kvds.data.batches import TokenBatch
from kvds.data.model_inputs import model_inputs
from kvds.distributed.process_group import all_reduce_sum
from kvds.kv import Selection, open_capture, pool_reasoning_steps
from kvds.kv.families import backbone
from kvds.teacher.teacher import TeacherOutput


@torch.no_grad()
def calibrate_aligner(
    aligner: KVAligner,
    student: nn.Module,
    batches: Iterable[TokenBatch],
    match: Callable[[TokenBatch], tuple[TeacherOutput, Selection]],
    *,
    rope: str,
) -> dict[str, list[float]]:
    """Fill the aligner's statistics and its closed-form start, the same on all ranks; before the engine is built.

    Args:
        aligner: Not yet sharded.
        student: On its device; sharded by ZeRO-3 or whole. Its parameters are gathered for these forwards only.
        batches: This rank's calibration batches; equally many on every rank.
        match: From a batch to the teacher's output and the positions that count.
        rope: ``"pre"`` or ``"post"``.

    Returns:
        As :meth:`kvds.align.fitting.AlignmentMoments.apply`.
    """
    moments = AlignmentMoments(aligner)
    was_training = student.training
    student.eval()
    sharded = [p for p in student.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        for batch in batches:
            with open_capture(backbone(student), aligner.reads, rope=rope) as capture:
                inputs = model_inputs(batch, student.config, next(student.parameters()).dtype)
                backbone(student)(**inputs, use_cache=False)
            output, selection = match(batch)
            if output.states is None:
                raise RuntimeError("calibration needs a teacher whose states are captured")
            own = capture.states
            if batch.reasoning_step_ids is not None:
                own = pool_reasoning_steps(own, batch.reasoning_step_ids, batch.num_reasoning_steps)  # type: ignore[type-var]
            moments.update(own, output.states, selection, _samples(batch, selection))
    student.train(was_training)
    moments.reduce(all_reduce_sum)
    return moments.apply()


def _samples(batch: TokenBatch, selection: Selection) -> Tensor | None:
    """``[B, M]`` the sample of each selected position in packed rows; None where a row is one sample."""
    if batch.packing is None or batch.reasoning_step_ids is not None:
        return None
    of_token = batch.packing.document_ids
    return of_token if selection.index is None else of_token.gather(1, selection.index)
