"""The losses at the language-model head: task cross entropy and logit distillation, in chunks of tokens.

Only positions that carry a label go through the head, and only one chunk of their logits lives at a time: its gradients
are made at once (:mod:`kvds.distillation.head_loss`) or, with logit distillation, the backward pass computes a chunk
again. The number of chunks is fixed by the caller, never by the data, since under ZeRO-3 each call of the head gathers
its weight on all ranks together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kvds.data.labels import LabelledPositions
from kvds.distillation.head_loss import summed_cross_entropy
from kvds.models.own_logits import Head

# Logits of one chunk: at most this many elements (256 MiB in fp32).
_CHUNK_ELEMENTS = 2**26


def head_chunk_count(max_tokens: int, vocab_size: int) -> int:
    """How many chunks keep a chunk's logits within the limit when ``max_tokens`` positions all count (the same on
    every rank).
    """
    return max(1, -(-max_tokens * vocab_size // _CHUNK_ELEMENTS))


def head_losses(
    head: Head,
    hidden: Tensor,
    labelled: LabelledPositions,
    *,
    num_chunks: int,
    teacher_head: Head | None = None,
    teacher_hidden: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sums over labelled positions of the cross entropy and of the forward KL divergence from teacher to student.

    ``task = Σ_n −log p_s(y_n)`` and ``kd = T² Σ_n Σ_v p_t(v) (log p_t(v) − log p_s(v))``, both at temperature ``T`` for
    ``kd``, over the first ``vocab_size`` entries (rows beyond are padding of the embedding and carry no token).

    Args:
        head: Student hidden states ``[n, hidden]`` → logits ``[n, vocab]``.
        hidden: Student ``[B, T, hidden]``, the backbone's output.
        labelled: The positions that count.
        num_chunks: Chunks of positions; every rank passes the same number.
        teacher_head: The same for the teacher; None without logit distillation.
        teacher_hidden: Teacher ``[B, T, hidden]``; None without logit distillation.
        temperature: ``T``, > 0.
        vocab_size: Entries that carry tokens; None = all.
        scale: Factor of both sums.

    Returns:
        ``task`` and ``kd``: fp32 scalars with a graph (``kd`` is 0 without a teacher).

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (2015), section 2, for ``kd``.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    teacher_rows = None if teacher_hidden is None else teacher_hidden.reshape(-1, teacher_hidden.shape[-1])

    if teacher_rows is None and isinstance(head, nn.Linear) and torch.is_grad_enabled():
        task = summed_cross_entropy(head, rows[labelled.index], labelled.target, num_chunks=num_chunks, scale=scale)
        return task, task.new_zeros(())

    def chunk_losses(student: Tensor, target: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = head(student).float()
        task = F.cross_entropy(logits, target, reduction="sum")
        if teacher is None or teacher_head is None:
            return task, task.new_zeros(())
        with torch.no_grad():
            teacher_logits = teacher_head(teacher).float()[:, :vocab_size]
            teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=-1)
        student_log_probs = F.log_softmax(logits[:, :vocab_size] / temperature, dim=-1)
        kd = F.kl_div(student_log_probs, teacher_log_probs, reduction="sum", log_target=True) * temperature**2
        return task, kd

    task, kd = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
    chunks = zip(
        labelled.index.tensor_split(num_chunks), labelled.target.tensor_split(num_chunks), strict=True
    )  # empty chunks still call the head: all ranks gather its weight equally often
    for index, target in chunks:
        teacher = None if teacher_rows is None else teacher_rows[index]
        inputs = (rows[index], target, teacher)
        if num_chunks == 1 or not torch.is_grad_enabled():
            chunk_task, chunk_kd = chunk_losses(*inputs)
        else:
            chunk_task, chunk_kd = checkpoint(chunk_losses, *inputs, use_reentrant=False, preserve_rng_state=False)
        task, kd = task + chunk_task, kd + chunk_kd
    return task * scale, kd * scale


def spoil_gradient(loss: Tensor) -> Tensor:
    """``loss`` itself, to the bit, with a NaN gradient where it is not finite.

    A loss can be infinite while its gradient is not (a constant part overflows); the step is to be left out all the
    same.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
