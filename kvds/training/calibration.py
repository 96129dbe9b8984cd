"""Calibration before step 1: an aligner's statistics and start from a few batches, the KV loss's weight from one.

Both see the training data in training order and touch neither weights of the student nor any state that training reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import deepspeed
import torch
from torch import Tensor, nn

from kvds.align import KVAligner
from kvds.align.fitting import AlignmentMoments
from kvds.data.batches import TokenBatch
from kvds.data.model_inputs import model_inputs
from kvds.distillation.step import LossWeights, StepInput
from kvds.distributed.process_group import all_reduce_sum
from kvds.errors import InputError
from kvds.kv import Selection, open_capture, pool_reasoning_steps
from kvds.kv.families import backbone
from kvds.teacher.teacher import TeacherOutput
from kvds.training.engine import discard_gradients, gradient_norm


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


@contextlib.contextmanager
def _without_dropout(engine: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which checkpointed layers are checkpointed all the same; afterwards the mode from before.

    A checkpointed layer asks its own mode alone, and what drops out is in its parts.
    """
    was_training = engine.training
    engine.eval()
    for module in engine.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
    try:
        yield
    finally:
        engine.train(was_training)


def calibrate_kv_weight(
    engine: deepspeed.DeepSpeedEngine, inputs: Sequence[Callable[[], StepInput]], share: float, task_weight: float
) -> float:
    """The weight at which the KV loss's gradient on the student has ``share`` times the norm of the task's.

    ``weight = share · task_weight · ‖∇_student CE‖ / ‖∇_student KV‖``, over the micro-batches of one global step, on
    any number of ranks, in the memory of a training step: one micro-batch at a time, checkpointed as in training, with
    the teacher run for either loss. No optimizer step is taken and no gradient stays.

    Args:
        engine: What trains.
        inputs: A call for each micro-batch, which makes the student's input.
        share: Of the task's norm.
        task_weight: Of the task loss.

    Raises:
        InputError: one of the two losses sends the student no gradient, so that no weight has the meaning asked for.
    """
    module = engine.module
    parameters = [p for p in module.student.parameters() if p.requires_grad]
    norms = {}
    with _without_dropout(engine):  # the ratio is that of the two losses, not of two masks
        for name, weights in (("task", LossWeights(task=1.0)), ("kv", LossWeights(task=0.0, kv=1.0))):
            for position, make_input in enumerate(inputs):
                engine.set_gradient_accumulation_boundary(position == len(inputs) - 1)
                loss = engine(step=replace(make_input(), weights=weights, watch=False))[0]
                engine.backward(loss)
                del loss
            norms[name] = gradient_norm(engine, parameters)
            discard_gradients(engine)
        engine.set_gradient_accumulation_boundary(None)
    if not norms["kv"] > 0 or not norms["task"] > 0:
        silent = "KV" if not norms["kv"] > 0 else "task"
        raise InputError(
            f"kv_weight=auto:{share}: the {silent} loss sends the student no gradient on the first batch "
            f"({norms[silent.lower()]:.3g}); expected a finite positive norm (give a number: --kv_weight 1.0)"
        )
    return share * task_weight * norms["task"] / norms["kv"]
