"""Which token positions are distilled.

A method scores nothing across samples: each row's selection depends on that row alone. The number of slots ``M`` comes
from the budget and the padded length, so no device is asked; rows with fewer eligible positions mask the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Budget = int | float | None


@dataclass(frozen=True)
class Selection:
    """Positions whose keys and values are compared, the same for teacher and student, all layers and heads.

    Attributes:
        index: ``[B, M]`` int64, ascending in each row; None = every position in order (M = T).
        mask: ``[B, M]`` bool, True where the slot counts.
    """

    index: Tensor | None
    mask: Tensor


def _eligible(segment_ids: Tensor, attention_mask: Tensor, mask_first_token: bool) -> Tensor:
    """``[B, T]`` bool: real tokens, without the first of each row (an attention sink) if asked."""
    real = attention_mask.bool() & (segment_ids != 0)
    if mask_first_token:
        # The first real token is the one with none before it; with left padding it is not at position 0.
        real = real & (real.cumsum(1) > 1)
    return real


def row_budget(budget: Budget, length: int) -> int:
    """Positions that a row of ``length`` real tokens may keep: a count as given, a fraction of the length rounded
    up.
    """
    if budget is None:
        return length
    return max(1, math.ceil(budget * length - 1e-9)) if isinstance(budget, float) else budget


def _full(eligible: Tensor, real_length: Tensor, budget: Budget) -> Selection:
    return Selection(None, eligible)


def _right_crop(eligible: Tensor, real_length: Tensor, budget: Budget) -> Selection:
    if isinstance(budget, float):
        kept = (budget * real_length.double() - 1e-9).ceil().clamp_min(1).long()
    else:
        kept = torch.full_like(real_length, int(budget or 0))
    tokens = eligible.shape[1]
    from_end = eligible.flip(1).cumsum(1).flip(1)  # 1 at the last eligible position, growing leftwards
    chosen = eligible & (from_end <= kept[:, None])
    slots = min(row_budget(budget, tokens), tokens)
    # Slots count back from the end of the row's last chosen position, so that a window of M holds them all in order.
    position = torch.arange(tokens, device=eligible.device)
    last = torch.where(chosen, position, 0).amax(1)
    index = (last[:, None] - slots + 1).clamp_min(0) + torch.arange(slots, device=eligible.device)
    index = index.clamp_max(tokens - 1)
    return Selection(index, chosen.gather(1, index))


METHODS: dict[str, Callable[[Tensor, Tensor, Budget], Selection]] = {"full": _full, "right_crop": _right_crop}


def select_tokens(
    method: str, budget: Budget, segment_ids: Tensor, attention_mask: Tensor, *, mask_first_token: bool = True
) -> Selection:
    """Choose the positions to distil.

    Args:
        method: ``"full"`` (every real token) or ``"right_crop"`` (the last ``budget`` real tokens).
        budget: Tokens per row (int), a fraction of the row's real length in (0, 1] (float), or None with ``full``.
        segment_ids: ``[B, T]``, 0 = padding.
        attention_mask: ``[B, T]``, 1 = real token.
        mask_first_token: Leave out each row's first real token, an attention sink.

    Returns:
        The selection, on the same device; no host sync.
    """
    real_length = (attention_mask.bool() & (segment_ids != 0)).sum(1)
    return METHODS[method](_eligible(segment_ids, attention_mask, mask_first_token), real_length, budget)


def selected_count(method: str, budget: Budget, length: int, *, mask_first_token: bool = True) -> int:
    """How many positions of a row with ``length`` real tokens :func:`select_tokens` marks True."""
    eligible = max(0, length - 1) if mask_first_token else length
    return eligible if method == "full" or length == 0 else min(row_budget(budget, length), eligible)
