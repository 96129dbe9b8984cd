"""Gradients of single losses: what the KV loss sends the student, measured against what the task sends it.

Nothing here takes an optimizer step, and no gradient stays: training goes on as if nobody had looked. One micro-batch
at a time goes through, checkpointed as in training, with the teacher run for it: the memory is that of a training step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import deepspeed
import torch
from torch import Tensor, nn

from kvds.distillation.calibration import kv_weight_of_share
from kvds.distillation.step import LossWeights, StepInput
from kvds.distributed.process_group import all_reduce_sum
from kvds.training.engine import discard_gradients, gradient_norm

MakeInput = Callable[[], StepInput]
_TASK, _KV = LossWeights(task=1.0), LossWeights(task=0.0, kv=1.0)


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


def _norm(
    engine: deepspeed.DeepSpeedEngine, terms: Sequence[tuple[MakeInput, LossWeights]], losses: dict[str, Tensor]
) -> float:
    """Norm of the student's gradient of all ``terms`` in sum, up to a factor that is the same for each call; what they
    measured is added to ``losses``.
    """
    for position, (make_input, weights) in enumerate(terms):
        engine.set_gradient_accumulation_boundary(position == len(terms) - 1)
        loss, metrics = engine(step=replace(make_input(), weights=weights, watch=False))
        engine.backward(loss)
        for name, value in metrics.items():
            losses[name] = losses[name] + value if name in losses else value
        del loss, metrics
    norm = gradient_norm(engine, [p for p in engine.module.student.parameters() if p.requires_grad])
    discard_gradients(engine)
    engine.set_gradient_accumulation_boundary(None)
    return norm


def calibrate_kv_weight(
    engine: deepspeed.DeepSpeedEngine, inputs: Sequence[MakeInput], share: float, task_weight: float, *,
    fitted: bool = False, may_be_none: bool = False,
) -> float:  # fmt: skip
    """The weight at which the KV loss's gradient on the student has ``share`` times the norm of the task's.

    ``weight = share · task_weight · ‖∇_student CE‖ / ‖∇_student KV‖``, over the micro-batches of one global step, on
    any number of ranks; see :func:`kvds.distillation.calibration.kv_weight_of_share` for maps that start fitted.

    Args:
        engine: What trains.
        inputs: A call for each micro-batch, which makes the student's input.
        share: Of the task's norm.
        task_weight: Of the task loss.
        fitted: Whether the maps start fitted.
        may_be_none: Whether 0 is returned where the KV loss sends no gradient.

    Raises:
        InputError: one of the two losses sends the student no gradient, so that no weight has the meaning asked for.
    """
    losses: dict[str, Tensor] = {}
    norms = {}
    with _without_dropout(engine):  # the ratio is that of the two losses, not of two masks
        norms["task"] = _norm(engine, [(make_input, _TASK) for make_input in inputs], {})
        norms["kv"] = _norm(engine, [(make_input, _KV) for make_input in inputs], losses)
    if may_be_none and norms["kv"] == 0:
        return 0.0
    return kv_weight_of_share(
        share, task_weight=task_weight, norms=(norms["task"], norms["kv"]), losses=_means(losses) if fitted else None
    )


def balanced_kv_weight(
    engine: deepspeed.DeepSpeedEngine, inputs: Sequence[MakeInput], share: float, others: Callable[..., Tensor]
) -> float:
    """The weight at which the KV loss counts ``share`` times all other losses on one global step; 0 where it is 0.

    Args:
        engine: What trains.
        inputs: A call for each micro-batch, which makes the student's input.
        share: Of the other losses.
        others: From a micro-batch's metrics to the other losses in sum.
    """
    losses: dict[str, Tensor] = {}
    with _without_dropout(engine), torch.no_grad():
        for make_input in inputs:
            made = make_input()
            metrics = engine(step=replace(made, weights=LossWeights(1.0, 1.0, float(made.teacher_head is not None))))[1]
            for name, value in {"loss/task": others(metrics), "loss/kv": metrics["loss/kv"]}.items():
                losses[name] = losses[name] + value if name in losses else value
    other, kv = _means(losses)
    return share * other / kv if kv > 0 else 0.0


def _means(losses: dict[str, Tensor]) -> list[float]:
    """``loss/task`` and ``loss/kv`` over all ranks, up to the same factor."""
    both = torch.stack([losses["loss/task"].double(), losses["loss/kv"].double()])
    all_reduce_sum(both)
    return both.tolist()


def kv_agreement(engine: deepspeed.DeepSpeedEngine, task: Sequence[MakeInput], kv: Sequence[MakeInput]) -> float:
    """Cosine of the gradients of two losses on the student: the task's on some rows, the KV loss's on others.

    Where it is above 0, following the KV loss lowers the task's loss on rows that it has not seen, to first order.
    Only norms are needed: ``cos = (‖a + b‖² − ‖a‖² − ‖b‖²) / (2 ‖a‖ ‖b‖)``, of gradients scaled to norm 1.

    Args:
        engine: What trains; every rank calls it.
        task: A call for each micro-batch of the rows for the task.
        kv: The same of the rows for the KV loss.

    Returns:
        A number from −1 to 1; 0 where one of the losses sends nothing, NaN where one, or its gradient, is not finite.
    """
    with _without_dropout(engine):
        of_task = _norm(engine, [(make_input, _TASK) for make_input in task], {})
        of_kv = _norm(engine, [(make_input, _KV) for make_input in kv], {})
        if not (math.isfinite(of_task) and math.isfinite(of_kv)):
            return math.nan
        if of_task == 0 or of_kv == 0:
            return 0.0
        units = [(make_input, LossWeights(task=1 / of_task)) for make_input in task]
        units += [(make_input, LossWeights(task=0.0, kv=1 / of_kv)) for make_input in kv]
        return (_norm(engine, units, {}) ** 2 - 2) / 2
