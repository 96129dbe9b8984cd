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

from kvds.errors import InputError

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
    """Positions a row of ``length`` real tokens may keep: a count as given, a fraction of the length rounded up."""
    if budget is None:
        return length
    return max(1, math.ceil(budget * length - 1e-9)) if isinstance(budget, float) else budget


def _compact(chosen: Tensor, slots: int) -> Selection:
    """Put the chosen positions of each row ``[B, T]``, at most ``slots`` of them, into ``slots`` ascending slots."""
    # Chosen positions first, then as many others as fill the slots; a second sort brings both back into time order.
    first = chosen.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :slots]
    index = first.sort(dim=1).values
    return Selection(index, chosen.gather(1, index))


def _full(eligible: Tensor, real_length: Tensor, budget: Budget) -> Selection:
    return Selection(None, eligible)


def _right_crop(eligible: Tensor, real_length: Tensor, budget: Budget) -> Selection:
    tokens = eligible.shape[1]
    if isinstance(budget, float):
        kept = (budget * real_length.double() - 1e-9).ceil().clamp_min(1)  # row_budget of each row, in the same float64
    else:
        kept = torch.full_like(real_length, row_budget(budget, tokens))
    from_end = eligible.flip(1).cumsum(1).flip(1)  # 1 at the last eligible position, growing leftwards
    return _compact(eligible & (from_end <= kept[:, None]), min(row_budget(budget, tokens), tokens))


METHODS: dict[str, Callable[[Tensor, Tensor, Budget], Selection]] = {"full": _full, "right_crop": _right_crop}


def _check(method: str, budget: Budget) -> None:
    if method not in METHODS:
        raise InputError(f"kv_method={method}: expected {' or '.join(METHODS)}")
    if method == "full":
        return
    # Whole numbers count tokens, so 1 is one token and 1.0 the whole row.
    valid = 0 < budget <= 1 if isinstance(budget, float) else budget is not None and budget >= 1
    if not valid:
        raise InputError(
            f"kv_budget={budget}: expected at least 1 token, or a fraction in (0, 1] (or --kv_method full)"
        )


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

    Raises:
        InputError: unknown method, or a budget that keeps no token.
    """
    _check(method, budget)
    real_length = (attention_mask.bool() & (segment_ids != 0)).sum(1)
    return METHODS[method](_eligible(segment_ids, attention_mask, mask_first_token), real_length, budget)


def selected_count(method: str, budget: Budget, length: int, *, mask_first_token: bool = True) -> int:
    """How many positions of a row with ``length`` real tokens :func:`select_tokens` marks True."""
    _check(method, budget)
    eligible = max(0, length - 1) if mask_first_token else length
    return eligible if method == "full" or length == 0 else min(row_budget(budget, length), eligible)
