"""Problems of the losses at the head, and what autograd says of them in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Problem = tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]
"""Logits, labels, a teacher's logits over a vocabulary that is padded further, and the keywords of the loss."""


def softmax_problem(
    rows: int, vocab: int, counted: int, distilled: bool, *, temperature: float = 2.0,
    dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> Problem:  # fmt: skip
    """Random logits that are far from uniform."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(width: int) -> Tensor:
        return (torch.randn(rows, width, generator=generator, device=device) * 4).to(dtype)

    target = torch.randint(0, counted, (rows,), generator=generator, device=device)
    keywords = {"task_scale": 0.3, "kd_scale": 0.7, "temperature": temperature, "vocab_size": counted}
    return draw(vocab), target, draw(vocab + 3) if distilled else None, keywords


def softmax_oracle(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Both sums and the gradient of their weighted sum."""
    logits, target, teacher, how = p
    x, counted, temperature = logits.double().requires_grad_(), how["vocab_size"], how["temperature"]
    task, kd = F.cross_entropy(x, target, reduction="sum"), x.new_zeros(())
    if teacher is not None:
        p_log, q_log = ((t.double()[:, :counted] / temperature).log_softmax(1) for t in (teacher, x))
        kd = temperature**2 * (p_log.exp() * (p_log - q_log)).sum()
    [gradient] = torch.autograd.grad(how["task_scale"] * task + how["kd_scale"] * kd, x)
    return task.detach(), kd.detach(), gradient
