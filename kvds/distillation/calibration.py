"""Calibration: an aligner's statistics and closed-form start, and the weight that a ratio of two gradients gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kvds.align import KVAligner
from kvds.align.attention_output import AttentionOutputError
from kvds.align.fitting import AlignmentMoments
from kvds.align.mix_fitting import MixFitting
from kvds.data.batches import TokenBatch
from kvds.data.model_inputs import first_rows, model_inputs, unpacked
from kvds.errors import InputError
from kvds.kv import KVStates, Observed, Selection, open_capture, pool_reasoning_steps
from kvds.kv.families import backbone
from kvds.teacher.teacher import Teacher, TeacherOutput

_JUDGED_ROWS = 8  # whose queries, keys and values of all layers are there at once


@torch.no_grad()
def fit_to_batches(
    aligner: KVAligner,
    student: nn.Module,
    batches: Callable[[], Iterable[TokenBatch]],
    match: Callable[[TokenBatch], tuple[TeacherOutput, Selection]],
    *,
    rope: str,
    all_reduce: Callable[[Tensor], None],
    forward: nn.Module | None = None,
) -> dict[str, list[float]]:
    """Fill the statistics of ``aligner`` and its closed-form start: layer mixes where they are learned, then the maps.

    Args:
        aligner: Not sharded.
        student: On its device, its parameters whole; in evaluation mode for these forwards only.
        batches: Gives this rank's batches, on its device, as often as it is called; equally many on every rank.
        match: From a batch to the teacher's output and the positions that count.
        rope: ``"pre"`` or ``"post"``.
        all_reduce: Sums over ranks in place.
        forward: What is called in place of the student's backbone: what shards it and gathers it when it is called.

    Returns:
        As :meth:`kvds.align.fitting.AlignmentMoments.apply`.
    """
    body = backbone(student)

    def add_all(moments: MixFitting | AlignmentMoments) -> None:
        for batch in batches():
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
        moments.reduce(all_reduce)

    was_training = student.training
    student.eval()
    if (mixes := MixFitting(aligner)).parts:
        add_all(mixes)
        mixes.apply()
    del mixes  # before what the maps take
    moments = AlignmentMoments(aligner)
    add_all(moments)
    student.train(was_training)
    return moments.apply()


def nothing_mapped(start_r2: Sequence[Mapping[str, Sequence[float]]]) -> bool:
    """Whether maps were fitted, for one teacher or several, and none explains anything.

    Args:
        start_r2: Of each teacher, as :func:`fit_to_batches` returns it.
    """
    found = [r2 for parts in start_r2 for layers in parts.values() for r2 in layers]
    return bool(found) and not any(r2 > 0 for r2 in found)


@torch.no_grad()
def attention_output_of_batch(
    aligner: KVAligner,
    student: nn.Module,
    teacher: Teacher,
    batch: TokenBatch,
    select: Callable[[TokenBatch, Observed | None], Selection],
    *,
    rope: str,
) -> AttentionOutputError | None:
    """What ``aligner`` changes of the target's attention output, on the first rows of a batch of this rank.

    None where nothing can be said: maps of neither keys nor values, steps of reasoning in place of positions, a teacher
    in parts.

    Args:
        aligner: Not sharded.
        student: As for :func:`fit_to_batches`.
        teacher: Of the row itself, not of another.
        batch: On its device.
        select: From a batch and what the teacher left for the choice to the positions that count.
        rope: ``"pre"`` or ``"post"``.
    """
    model = teacher.whole_model
    target = model if aligner.settings.direction == "student_to_teacher" else student
    if model is None or target is None or batch.reasoning_step_ids is not None:
        return None
    if not AttentionOutputError.measures(aligner, target):
        return None
    error = AttentionOutputError(aligner, target, rope=rope, plain_values=teacher.plain_values)
    batch = first_rows(unpacked(batch), _JUDGED_ROWS)
    was_training = student.training
    body = backbone(student.eval())
    with error.watch() as watched, open_capture(body, aligner.reads, rope=rope) as capture:
        body(**model_inputs(batch, body.config, next(student.parameters()).dtype), use_cache=False)
        output = teacher(batch)
    student.train(was_training)
    own, theirs = capture.states, output.states
    assert isinstance(own, KVStates) and isinstance(theirs, KVStates)
    real = batch.attention_mask.bool() & (batch.segment_ids != 0)
    error.update(own, theirs, watched, select(batch, output.observed), real)
    return error


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
