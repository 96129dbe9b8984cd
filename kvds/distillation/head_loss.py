"""Losses through a language-model head whose gradients are made in the forward pass, chunk by chunk.

The gradient of the losses by the logits is known as soon as the logits are. So each chunk of logits is made once,
turned into its gradient in place (:mod:`kvds.ops.softmax_loss`), multiplied into the gradients of hidden states and
weight, and dropped: three matrix products where recomputing chunks in the backward pass takes four, and one addition to
the weight's gradient in place of a copy per chunk.

Source: the idea is that of Liger-Kernel's fused linear cross entropy (Hsu et al., 2024, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kvds.distillation.head_chunks import chunk_count
from kvds.kv.module_forward import forward_of
from kvds.models.own_logits import Head
from kvds.ops.divergences import Divergence
from kvds.ops.softmax_loss import FORWARD_KL, softmax_losses_

# Elements that are widened at a time (128 MiB in fp32).
_SLICE = 2**25


class HeadLosses(NamedTuple):
    """What the head adds to the loss, with a graph, and without one the losses of which it is the weighted sum."""

    loss: Tensor
    task: Tensor
    kd: Tensor


@dataclass(frozen=True)
class TaughtRows:
    """What logit distillation compares with.

    Attributes:
        head: The teacher's, ``[n, hidden]`` → logits ``[n, vocab]``; called once per chunk.
        rows: ``[N, hidden]``, the teacher's hidden states of the same positions.
        temperature: ``T``, > 0.
        vocab_size: Entries that carry tokens; None = all.
        weight: Of the divergence in the loss.
        divergence: From the teacher.
    """

    head: Head
    rows: Tensor
    temperature: float = 1.0
    vocab_size: int | None = None
    weight: float = 1.0
    divergence: Divergence = FORWARD_KL


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        taught: TaughtRows | None,
        num_chunks: int | None,
        scales: tuple[float, float],
        training: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_rows, needs_weight, needs_bias = (training and needed for needed in ctx.needs_input_grad[:3])
        scale, task_weight = scales
        kd_weight = 0.0 if taught is None else taught.weight
        chunks = num_chunks or chunk_count(
            len(rows), weight.shape[0], rows.element_size(), distilled=taught is not None
        )
        task, kd = (rows.new_zeros((), dtype=torch.promote_types(torch.float32, rows.dtype)) for _ in range(2))
        d_rows = torch.empty_like(rows) if needs_rows else None
        d_weight = d_bias = None
        begin = 0
        for part, labels in zip(rows.tensor_split(chunks), target.tensor_split(chunks), strict=True):
            end = begin + len(part)
            logits = nn.functional.linear(part, weight, bias)
            taught_logits = None if taught is None else taught.head(taught.rows[begin:end])
            part_task, part_kd = softmax_losses_(
                logits, labels, task_scale=task_weight * scale, kd_scale=kd_weight * scale,
                teacher_logits=taught_logits, temperature=1.0 if taught is None else taught.temperature,
                vocab_size=None if taught is None else taught.vocab_size, gradient=training,
                divergence=FORWARD_KL if taught is None else taught.divergence,
            )  # fmt: skip
            task, kd = task + part_task, kd + part_kd
            del taught_logits
            gradient = logits.to(weight.dtype)
            if d_rows is not None:
                d_rows[begin:end] = gradient @ weight
            if needs_weight:
                d_weight = gradient.T @ part if d_weight is None else d_weight.addmm_(gradient.T, part)
            if needs_bias:
                d_bias = gradient.sum(0) if d_bias is None else d_bias.add_(gradient.sum(0))
            del logits, gradient  # before the next chunk's are made
            begin = end
        ctx.save_for_backward(d_rows, d_weight, d_bias)
        task, kd = task * scale, kd * scale
        ctx.mark_non_differentiable(task, kd)
        return task_weight * task + kd_weight * kd if taught is not None else task_weight * task, task, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # The scalar is multiplied in, not looked at: nothing waits for the device.
        return *(None if g is None else _scaled(g, upstream) for g in ctx.saved_tensors), *(None,) * 5


def _scaled(tensor: Tensor, scalar: Tensor) -> Tensor:
    """``tensor · scalar`` in the tensor's dtype; the scalar itself is never rounded to bf16, which would scale all."""
    if tensor.dtype == scalar.dtype:
        return tensor * scalar
    out = torch.empty_like(tensor)
    for source, target in zip(tensor.flatten().split(_SLICE), out.view(-1).split(_SLICE), strict=True):
        target.copy_(source.to(scalar.dtype) * scalar)
    return out


def losses_at_head(
    head: nn.Linear,
    rows: Tensor,
    target: Tensor,
    *,
    taught: TaughtRows | None = None,
    num_chunks: int | None = None,
    scale: float = 1.0,
    task_weight: float = 1.0,
) -> HeadLosses:
    """``scale · Σ_n −log softmax(head(rows_n))[target_n]`` and the divergence from a teacher, as one loss, with at most
    one chunk of logits alive.

    It runs as the forward of ``head``: there, and only there, ZeRO-3 has the whole weight. One call gathers it once,
    whatever the chunks.

    Args:
        head: The language-model head.
        rows: ``[N, hidden]``; N may be 0, which gives 0 with a graph.
        target: ``[N]`` int64.
        taught: The teacher's side; None without logit distillation.
        num_chunks: Chunks of rows; None: as many as keep a chunk's logits within the limit.
        scale: Factor of the losses, best the whole of it: one that comes with the backward pass rounds bf16 gradients
            a second time.
        task_weight: Of the cross entropy in the loss.

    Returns:
        Scalars, fp32 (fp64 for fp64 rows).
    """
    own, training, found = head.forward, torch.is_grad_enabled(), []

    def forward(rows: Tensor, target: Tensor) -> Tensor:
        scales = (scale, task_weight)
        with forward_of(head, own):  # the teacher's head may be the same
            losses = _HeadLosses.apply(rows, head.weight, head.bias, target, taught, num_chunks, scales, training)
        found.extend(losses[1:])
        loss: Tensor = losses[0]
        return loss

    with forward_of(head, forward):
        loss: Tensor = head(rows, target)
    return HeadLosses(loss, *found)
