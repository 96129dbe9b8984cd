"""Calibration: the moments that an aligner starts from, and the weight that a ratio of two gradients gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from kvds.align import KVAligner
from kvds.align.fitting import AlignmentMoments
from kvds.data.batches import TokenBatch
from kvds.data.model_inputs import model_inputs
from kvds.errors import InputError
from kvds.kv import Selection, open_capture, pool_reasoning_steps
from kvds.kv.families import backbone
from kvds.teacher.teacher import TeacherOutput


@torch.no_grad()
def moments_of_batches(
    aligner: KVAligner,
    student: nn.Module,
    batches: Iterable[TokenBatch],
    match: Callable[[TokenBatch], tuple[TeacherOutput, Selection]],
    *,
    rope: str,
    forward: nn.Module | None = None,
) -> AlignmentMoments:
    """What ``aligner`` is fitted to, of this rank's batches; neither reduced over ranks nor applied.

    Args:
        aligner: Not sharded.
        student: On its device, its parameters whole; in evaluation mode for these forwards only.
        batches: On its device.
        match: From a batch to the teacher's output and the positions that count.
        rope: ``"pre"`` or ``"post"``.
        forward: What is called in place of the student's backbone: what shards it and gathers it when it is called.
    """
    moments = AlignmentMoments(aligner)
    was_training = student.training
    student.eval()
    body = backbone(student)
    for batch in batches:
        with open_capture(body, aligner.reads, rope=rope) as capture:
            inputs = model_inputs(batch, body.config, next(student.parameters()).dtype)
            (body if forward is None else forward)(**inputs, use_cache=False)
        output, selection = match(batch)
        if output.states is None:
            raise RuntimeError("calibration needs a teacher whose states are captured")
        own = capture.states
        if batch.reasoning_step_ids is not None:
            own = pool_reasoning_steps(own, batch.reasoning_step_ids, batch.num_reasoning_steps)  # type: ignore[type-var]
        moments.update(own, output.states, selection, _samples(batch, selection))
    student.train(was_training)
    return moments


def _samples(batch: TokenBatch, selection: Selection) -> Tensor | None:
    """``[B, M]`` the sample of each selected position in packed rows; None where a row is one sample."""
    if batch.packing is None or batch.reasoning_step_ids is not None:
        return None
    of_token = batch.packing.document_ids
    return of_token if selection.index is None else of_token.gather(1, selection.index)


def kv_weight_of_share(
    share: float, *, task_weight: float, norms: Sequence[float], losses: Sequence[float] | None = None
) -> float:
    """The weight at which the KV loss's gradient on the student has ``share`` times the norm of the task's.

    A map that was fitted leaves a residual with little gradient, the less the better or the emptier it is: then the KV
    loss may not count more than ``share`` times the task's loss either, ``weight ≤ share · task_weight · CE / KV``.

    Args:
        share: Of the task's norm.
        task_weight: Of the task loss.
        norms: Of the gradients of the task loss and of the KV loss, each at a weight of 1.
        losses: Task loss and KV loss, where the maps start fitted.

    Raises:
        InputError: one of the two losses sends the student no gradient, so that no weight has the meaning asked for.
    """
    task, kv = norms
    if not kv > 0 or not task > 0:
        silent, norm = ("KV", kv) if not kv > 0 else ("task", task)
        raise InputError(
            f"kv_weight=auto:{share}: the {silent} loss sends the student no gradient on the first batch "
            f"({norm:.3g}); expected a finite positive norm (give a number: --kv_weight 1.0)"
        )
    weight = share * task_weight * task / kv
    return weight if losses is None else min(weight, share * task_weight * losses[0] / losses[1])
