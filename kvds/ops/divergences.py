"""Divergences of a student's distribution over tokens from a teacher's, summed over positions.

With ``p`` the teacher's and ``q`` the student's probabilities: ``forward_kl = Σ p (log p − log q)``, which covers
all that the teacher finds likely; ``reverse_kl = Σ q (log q − log p)``, which stays where the teacher is; and between
both ``jsd = β KL(p ‖ m) + (1 − β) KL(q ‖ m)`` with ``m = β p + (1 − β) q``. With ``top_k`` the tokens that the teacher
finds the ``k`` likeliest count each by itself and all others as one.

Source: Agarwal et al., On-Policy Distillation of Language Models (2024), section 3.1, for ``jsd`` and ``reverse_kl``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Divergence:
    """What logit distillation makes small.

    Attributes:
        kind: One of :data:`KINDS`.
        beta: Of ``jsd``, in (0, 1).
        top_k: How many tokens count by themselves; 0 = all.
    """

    kind: str = "forward_kl"
    beta: float = 0.5
    top_k: int = 0

    @property
    def plain(self) -> bool:
        """Whether it is the one that the kernel at the head knows."""
        return self.kind == "forward_kl" and not self.top_k

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The sum over rows, a scalar.

        Args:
            student: ``[n, vocab]`` log-probabilities.
            teacher: The same of the teacher, without gradient.
        """
        if 0 < self.top_k < student.shape[1]:
            top = teacher.topk(self.top_k, dim=1).indices
            student, teacher = _with_tail(student, top), _with_tail(teacher, top)
        if self.kind == "forward_kl":
            return _kl(teacher, student)
        if self.kind == "reverse_kl":
            return _kl(student, teacher)
        between = torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))
        return self.beta * _kl(teacher, between) + (1 - self.beta) * _kl(student, between)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """``Σ p (log p − log q)`` of log-probabilities; what has no probability under ``p`` adds nothing."""
    probabilities = p.exp()
    return (probabilities * torch.where(probabilities > 0, p - q, 0.0)).sum()


def _with_tail(log_probs: Tensor, top: Tensor) -> Tensor:
    """``[n, k + 1]``: the log-probabilities at ``top`` ``[n, k]``, and that of all others together."""
    tail = log_probs.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat((log_probs.gather(1, top), tail), 1)
