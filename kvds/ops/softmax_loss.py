"""Losses at a language-model head from its logits, and their gradient in place of the logits.

With logits x of one position, label y, teacher's logits z and temperature T: ``task = log Σ_v exp x_v − x_y`` and
``kd = T² Σ_v p_v (log p_v − log q_v)`` with ``p = softmax(z / T)``, ``q = softmax(x / T)`` over the entries that carry
tokens, or another divergence (:mod:`kvds.ops.divergences`). Their gradients by x are ``softmax(x) − 1[v = y]`` and
``T (q − p)``: known as soon as the logits are, so that nothing of the logits' size is needed beside them. On a GPU one
kernel reads a row twice and writes it once; elsewhere, where triton is not installed, and for another divergence, torch
does the same on a few rows at a time.

Neither library that has such a loss fits. ``torch.nn.functional.linear_cross_entropy`` came after the oldest torch that
runs here, makes a chunk's gradient by a sequence of plain operations and knows no teacher. Liger-Kernel's fused linear
cross entropy reads a count from the device in each call, which makes the host wait inside a step, splits 2,807 rows of
Qwen2-0.5B into 88 chunks by default, and gets the factor of a sum with the backward pass, when bf16 gradients are
rounded already; its losses with a teacher are apart from it. It would be a dependency of its own for what is one kernel
here.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018), for the kernel's first pass.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from kvds.ops.divergences import Divergence

FORWARD_KL = Divergence()
# Elements that torch widens at a time (16 MiB in fp32).
_SLICE = 2**22


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def softmax_losses_(
    logits: Tensor,
    target: Tensor,
    *,
    task_scale: float = 1.0,
    kd_scale: float = 0.0,
    teacher_logits: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    divergence: Divergence = FORWARD_KL,
    gradient: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sums of cross entropy and of the divergence from the teacher; the logits become their gradient.

    Args:
        logits: ``[n, vocab]``, contiguous rows of any floating dtype; afterwards, scaled before it is rounded, the
            gradient of ``task_scale · task + kd_scale · kd``.
        target: ``[n]`` int64 labels.
        task_scale: Factor of the cross entropy in the gradient.
        kd_scale: Factor of the divergence in the gradient.
        teacher_logits: ``[n, teacher's vocab]``, contiguous rows; None without distillation.
        temperature: ``T``, > 0.
        vocab_size: Entries that the divergence counts; None = all that both have.
        divergence: Of which the kernel knows the forward KL over all tokens; any other is torch's on every device.
        gradient: False leaves the logits as they are.
        impl: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``task`` and ``kd``, sums over rows without the scales: fp32 scalars (fp64 for fp64 logits), ``kd`` 0 without a
        teacher.
    """
    counted = min(x.shape[1] for x in (logits, teacher_logits) if x is not None)
    counted = counted if vocab_size is None else min(vocab_size, counted)
    fits = logits.is_cuda and logits.dtype != torch.float64 and _has_triton() and divergence.plain
    if impl == "triton" or (impl == "auto" and fits):
        from kvds.ops.softmax_kernel import softmax_losses_triton

        return softmax_losses_triton(
            logits, target, teacher_logits, counted, temperature, task_scale, kd_scale, gradient
        )
    wide = torch.promote_types(torch.float32, logits.dtype)
    task, kd = (torch.zeros((), dtype=wide, device=logits.device) for _ in range(2))
    rows = max(1, _SLICE // logits.shape[1])
    for begin in range(0, len(logits), rows):
        part = slice(begin, begin + rows)
        x, labels = logits[part].to(wide), target[part, None]
        log_probs = x.log_softmax(1)
        task -= log_probs.gather(1, labels).sum()
        result = log_probs.exp_().mul_(task_scale)
        result.scatter_add_(1, labels, torch.full_like(result[:, :1], -task_scale))
        if teacher_logits is not None and not divergence.plain:
            teacher = (teacher_logits[part, :counted].to(wide) / temperature).log_softmax(1)
            with torch.enable_grad():
                own = x[:, :counted].detach().requires_grad_()
                apart = divergence((own / temperature).log_softmax(1), teacher) * temperature**2
                [slope] = torch.autograd.grad(apart, own)
            kd += apart.detach()
            result[:, :counted] += slope.mul_(kd_scale)
        elif teacher_logits is not None:
            student = (x[:, :counted] / temperature).log_softmax(1)
            del x
            teacher = (teacher_logits[part, :counted].to(wide) / temperature).log_softmax(1)
            probabilities = teacher.exp()
            kd += teacher.sub_(student).mul_(probabilities).sum() * temperature**2
            result[:, :counted] += student.exp_().sub_(probabilities).mul_(kd_scale * temperature)
        if gradient:
            logits[part] = result
    return task, kd
