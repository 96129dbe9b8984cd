"""Losses at the language-model head: task cross entropy and logit distillation, in chunks of tokens.

Only positions that carry a label go through the head, and only one chunk of their logits lives at a time: its gradients
are made at once (:mod:`kvds.distillation.head_loss`) or, where the model's own forward stands between head and logits,
the backward pass computes a chunk again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kvds.data.labels import LabelledPositions
from kvds.distillation.head_loss import HeadLosses, TaughtRows, losses_at_head
from kvds.models.own_logits import Head
from kvds.ops.divergences import Divergence
from kvds.ops.softmax_loss import FORWARD_KL


def head_losses(
    head: Head,
    hidden: Tensor,
    labelled: LabelledPositions,
    *,
    num_chunks: int | None = None,
    teacher_head: Head | None = None,
    teacher_hidden: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    divergence: Divergence = FORWARD_KL,
    scale: float = 1.0,
    task_weight: float = 1.0,
    kd_weight: float = 1.0,
) -> HeadLosses:
    """The cross entropy and the divergence of the student from the teacher, summed over labelled positions.

    ``task = Σ_n −log p_s(y_n)`` and ``kd = T² Σ_n D(p_t, p_s)``, both distributions at temperature ``T`` for ``kd``,
    over the first ``vocab_size`` entries (rows beyond are padding of the embedding and carry no token). By default
    ``D`` is the forward KL divergence ``Σ_v p_t(v) (log p_t(v) − log p_s(v))``.

    Args:
        head: Student hidden states ``[n, hidden]`` → logits ``[n, vocab]``.
        hidden: Student ``[B, T, hidden]``, the backbone's output.
        labelled: The positions that count.
        num_chunks: Chunks of positions; None: as many as keep a chunk's logits within the limit. See
            :func:`kvds.distillation.head_chunks.agreed_chunks`.
        teacher_head: The same for the teacher; None without logit distillation.
        teacher_hidden: Teacher ``[B, T, hidden]``; None without logit distillation.
        temperature: ``T``, > 0.
        vocab_size: Entries that carry tokens; None = all.
        divergence: ``D``.
        scale: Factor of both sums.
        task_weight: Factor of ``task`` in the loss.
        kd_weight: Factor of ``kd`` in the loss.

    Returns:
        ``task_weight · task + kd_weight · kd`` with a graph, and both without one: fp32 scalars (``kd`` is 0 without a
        teacher).

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (2015), section 2, for ``kd``.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])[labelled.index]
    taught = None
    if teacher_head is not None and teacher_hidden is not None:
        teacher_rows = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])[labelled.index]
        taught = TaughtRows(teacher_head, teacher_rows, temperature, vocab_size, kd_weight, divergence)
    if isinstance(head, nn.Linear):
        return losses_at_head(
            head, rows, labelled.target, taught=taught, num_chunks=num_chunks, scale=scale, task_weight=task_weight
        )
    task, kd = _recomputed_losses(head, rows, labelled.target, taught, num_chunks or 1)
    loss = task_weight * scale * task
    if taught is not None:
        loss = loss + kd_weight * scale * kd
    return HeadLosses(loss, scale * task.detach(), scale * kd.detach())


def _recomputed_losses(
    head: Head, rows: Tensor, target: Tensor, taught: TaughtRows | None, num_chunks: int
) -> tuple[Tensor, Tensor]:
    """Both sums with graphs; the backward pass calls the heads of each chunk again."""

    def chunk_losses(student: Tensor, target: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = head(student).float()
        task = F.cross_entropy(logits, target, reduction="sum")
        if teacher is None or taught is None:
            return task, task.new_zeros(())
        with torch.no_grad():
            teacher_logits = taught.head(teacher).float()
        counted = min(logits.shape[1], teacher_logits.shape[1], taught.vocab_size or logits.shape[1])
        own, other = ((x[:, :counted] / taught.temperature).log_softmax(-1) for x in (logits, teacher_logits))
        return task, taught.divergence(own, other) * taught.temperature**2

    task, kd = rows.new_zeros((), dtype=torch.float32), rows.new_zeros((), dtype=torch.float32)
    teacher_parts = [None] * num_chunks if taught is None else taught.rows.tensor_split(num_chunks)
    chunks = zip(
        rows.tensor_split(num_chunks), target.tensor_split(num_chunks), teacher_parts, strict=True
    )  # empty chunks still call the heads: ranks whose weights are sharded gather them equally often
    for inputs in chunks:
        if num_chunks == 1 or not torch.is_grad_enabled():
            chunk_task, chunk_kd = chunk_losses(*inputs)
        else:
            chunk_task, chunk_kd = checkpoint(chunk_losses, *inputs, use_reentrant=False, preserve_rng_state=False)
        task, kd = task + chunk_task, kd + chunk_kd
    return task, kd


def spoil_gradient(loss: Tensor) -> Tensor:
    """``loss`` itself, to the bit, with a NaN gradient where it is not finite.

    A loss can be infinite while its gradient is not (a constant part overflows); the step is to be left out all the
    same.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
