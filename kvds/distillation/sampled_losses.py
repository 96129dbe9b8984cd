"""Losses at the head of a batch some of whose completions the student wrote itself.

No label says what should have stood there in place of what the student wrote: the task loss counts the rows of the data
alone, logit distillation both, and each is a mean over the tokens that it counts. Token by token the divergence is that
of Agarwal et al., On-Policy Distillation of Language Models (2024), section 3.1, equation 4: of the teacher's and the
student's distributions on the student's own text, through whose drawing no gradient flows.
"""

from __future__ import annotations

from collections.abc import Callable

from kvds.distillation.head_loss import HeadLosses
from kvds.distillation.step import StepInput


def losses_with_sampled(losses_at: Callable[..., HeadLosses], step: StepInput, *, distilled: bool) -> HeadLosses:
    """The head's losses of ``step``, of its data and of what the student wrote.

    Args:
        losses_at: :func:`kvds.distillation.losses.head_losses`, all but the positions, the scale and the task's weight.
        step: With positions of both kinds, either of which may be none.
        distilled: Whether logits are distilled; the same on all ranks, which call their heads equally often.
    """
    batch = step.batch
    assert batch.taught_normalizer is not None
    scale = 1 / batch.taught_normalizer
    # Of the mean over all taught tokens that over the data's.
    task = batch.taught_normalizer / batch.label_normalizer if batch.label_normalizer else 0.0
    data = losses_at(step.labelled, scale=scale, task_weight=task * step.weights.task)
    if not distilled:
        return data._replace(task=task * data.task)
    own = losses_at(step.sampled, scale=scale, task_weight=0.0)
    return HeadLosses(data.loss + own.loss, task * data.task, data.kd + own.kd)
