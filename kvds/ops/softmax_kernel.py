"""Triton kernel of the losses at a language-model head: a row of logits per program, its gradient in its place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements that a program holds at a time, eight per thread: a load of 16 bytes in bf16.
_BLOCK, _WARPS = 4096, 16


@triton.jit
def _absorb(largest, total, x):
    """Running maximum and sum of exponentials of each lane, with one exponential per element.

    A lane that has seen nothing holds the lowest finite number and 0; what is NaN or +inf makes the sum NaN.
    """
    gap = x - largest
    step = tl.exp(-tl.abs(gap))
    return tl.maximum(largest, x), tl.where(gap > 0, total * step + 1.0, total + step)


@triton.jit
def _normalizer(largest, total):
    """The logarithm of the sum of exponentials over all lanes."""
    top = tl.max(largest, 0)
    return top + tl.log(tl.sum(total * tl.exp(largest - top), 0))


@triton.jit
def softmax_loss_kernel(
    logits, target, teacher, task_losses, kd_losses, logits_stride, teacher_stride, task_scale, kd_scale,
    inverse_temperature, VOCAB: tl.constexpr, KD_VOCAB: tl.constexpr, DISTIL: tl.constexpr, WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses of row ``program_id``; with ``WRITE`` its logits become their gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    lanes = tl.arange(0, BLOCK)
    nothing = tl.full((BLOCK,), -3.4028234e38, tl.float32)
    largest, total = nothing, tl.zeros((BLOCK,), tl.float32)
    student_largest, student_total = nothing, tl.zeros((BLOCK,), tl.float32)
    teacher_largest, teacher_total = nothing, tl.zeros((BLOCK,), tl.float32)
    if DISTIL:
        teacher += row * teacher_stride
    label = tl.load(target + row)
    # Read before the reductions below, which all threads wait for, and so before any thread writes a gradient.
    labelled = tl.load(logits + label).to(tl.float32)
    for begin in range(0, VOCAB, BLOCK):
        at = begin + lanes
        x = tl.load(logits + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
        largest, total = _absorb(largest, total, x)
        if DISTIL:
            x = tl.where(at < KD_VOCAB, x * inverse_temperature, float("-inf"))
            student_largest, student_total = _absorb(student_largest, student_total, x)
            z = tl.load(teacher + at, mask=at < KD_VOCAB, other=float("-inf")).to(tl.float32)
            teacher_largest, teacher_total = _absorb(teacher_largest, teacher_total, z * inverse_temperature)
    normalizer = _normalizer(largest, total)
    tl.store(task_losses + row, normalizer - labelled)
    if DISTIL:
        student_normalizer = _normalizer(student_largest, student_total)
        teacher_normalizer = _normalizer(teacher_largest, teacher_total)
    if WRITE or DISTIL:
        divergence = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, VOCAB, BLOCK):
            at = begin + lanes
            x = tl.load(logits + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
            gradient = task_scale * (tl.exp(x - normalizer) - tl.where(at == label, 1.0, 0.0))
            if DISTIL:
                counts = at < KD_VOCAB
                z = tl.load(teacher + at, mask=counts, other=0.0).to(tl.float32)
                student_log = x * inverse_temperature - student_normalizer
                teacher_log = z * inverse_temperature - teacher_normalizer
                probability = tl.exp(teacher_log)
                divergence += tl.where(counts, probability * (teacher_log - student_log), 0.0)
                gradient += tl.where(counts, kd_scale * (tl.exp(student_log) - probability), 0.0)
            if WRITE:
                tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < VOCAB)
        if DISTIL:
            tl.store(kd_losses + row, tl.sum(divergence, 0))


def softmax_losses_triton(
    logits: Tensor,
    target: Tensor,
    teacher_logits: Tensor | None,
    vocab_size: int,
    temperature: float,
    task_scale: float,
    kd_scale: float,
    gradient: bool,
    block: int = _BLOCK,
) -> tuple[Tensor, Tensor]:
    """:func:`kvds.ops.softmax_loss.softmax_losses_` by the kernel, ``block`` elements (a power of two) at a time."""
    rows, vocab = logits.shape
    losses = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    distil = teacher_logits is not None
    if not distil:
        losses[1].zero_()
    teacher = logits if teacher_logits is None else teacher_logits
    if rows:
        softmax_loss_kernel[(rows,)](
            logits, target, teacher, losses[0], losses[1], logits.stride(0), teacher.stride(0), task_scale,
            kd_scale * temperature, 1 / temperature, VOCAB=vocab, KD_VOCAB=vocab_size, DISTIL=distil, WRITE=gradient,
            BLOCK=min(block, triton.next_power_of_2(vocab)), num_warps=_WARPS,
        )  # fmt: skip
    task, kd = losses.sum(1)
    return task, kd * temperature**2
