"""Token selection: which positions are distilled.

A method scores nothing across samples: each row's selection depends on that row alone. The number of slots ``M`` comes
from the budget and the padded length, so no device is asked; rows with fewer eligible positions mask the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvds.config.selection_methods import SELECTION_METHODS
from kvds.errors import InputError, listed
from kvds.kv.draws import token_draws
from kvds.kv.observed import ANSWER_SEGMENT, Observed, ObservingRows, last_rows
from kvds.kv.scores import token_scores

Budget = int | float | None


@dataclass(frozen=True)
class Selection:
    """Positions whose keys and values are compared, the same for teacher and student, all layers and heads.

    Attributes:
        index: ``[B, M]`` int64, ascending in each row; None = every position in order (M = T).
        mask: ``[B, M]`` bool, True where the slot counts.
        weight: ``[B, M]`` floating, how much a slot counts, of mean 1 over those of a sample that do and 0 at others;
            None = all alike.
    """

    index: Tensor | None
    mask: Tensor
    weight: Tensor | None = None

    def at(self, tokens: int) -> Tensor:
        """``[B, tokens]`` bool: which positions count."""
        if self.index is None:
            return self.mask
        found = torch.zeros(len(self.mask), tokens, dtype=torch.int64, device=self.mask.device)
        # Integer sums are exact in any order; a slot that does not count adds nothing.
        return found.scatter_add(1, self.index, self.mask.long()) > 0


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


def _kept(real_length: Tensor, budget: Budget, tokens: int) -> Tensor:
    """``[B]`` :func:`row_budget` of each row, on its device."""
    if isinstance(budget, float):
        return (budget * real_length.double() - 1e-9).ceil().clamp_min(1).long()  # in row_budget's float64
    return torch.full_like(real_length, row_budget(budget, tokens))


def _right_crop(eligible: Tensor, kept: Tensor, drawn: Tensor | None) -> Tensor:
    from_end = eligible.flip(1).cumsum(1).flip(1)  # 1 at the last eligible position, growing leftwards
    return eligible & (from_end <= kept[:, None])


def _uniform(eligible: Tensor, kept: Tensor, drawn: Tensor | None) -> Tensor:
    """The last position of each of ``kept`` stretches of equal length (within one position)."""
    place, count = eligible.cumsum(1), eligible.sum(1, keepdim=True)  # 1, 2, … at eligible positions
    kept = torch.minimum(kept[:, None], count)
    count = count.clamp_min(1)
    return eligible & (place * kept // count > (place - 1) * kept // count)


def _best(eligible: Tensor, kept: Tensor, scores: Tensor) -> Tensor:
    """The ``kept`` eligible positions of largest score; of equal ones the latest."""
    lowest = -torch.inf if scores.is_floating_point() else -1
    scores = torch.where(eligible, scores, lowest)
    # Backwards in time, so that a stable sort puts the latest of equals first; then each position's rank.
    order = scores.flip(1).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places).flip(1)
    return eligible & (rank < kept[:, None])


def _random(eligible: Tensor, kept: Tensor, drawn: Tensor | None) -> Tensor:
    if drawn is None:
        raise ValueError("kv_method=random reads draws: one number for each row")
    return _best(eligible, kept, drawn)


CHOICES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "right_crop": _right_crop,
    "uniform": _uniform,
    "random": _random,
}
"""Method that looks at no key → from eligible positions ``[B, T]``, how many of a row are kept ``[B]`` and a number
drawn for each position ``[B, T]`` (None where none are) to those kept ``[B, T]``."""


def _check(method: str, budget: Budget) -> None:
    if method not in SELECTION_METHODS:
        raise InputError(f"kv_method={method}: expected {listed(list(SELECTION_METHODS), 'or')}")
    if not SELECTION_METHODS[method].budget:
        return
    # Whole numbers count tokens, so 1 is one token and 1.0 the whole row.
    valid = 0 < budget <= 1 if isinstance(budget, float) else budget is not None and budget >= 1
    if not valid:
        raise InputError(
            f"kv_budget={budget}: expected at least 1 token, or a fraction in (0, 1] (or --kv_method full)"
        )


def observing_rows(
    method: str, segment_ids: Tensor, attention_mask: Tensor, *, observing_tokens: int | None = None
) -> ObservingRows | None:
    """The tokens whose queries a method wants captured; None where it looks at no keys either.

    The last ``observing_tokens`` of the row or of the answer, or none, only keys, as
    :data:`kvds.config.selection_methods.SELECTION_METHODS` says. Their number of slots comes from the setting and the
    padded length alone.

    Args:
        method: A selection method.
        segment_ids: ``[B, T]``, 0 = padding, 3 = answer.
        attention_mask: ``[B, T]``, 1 = real token.
        observing_tokens: Per row; None = the method's own number.
    """
    facts = SELECTION_METHODS[method]
    if not facts.reads_keys:
        return None
    real = attention_mask.bool() & (segment_ids != 0)
    if facts.observers == "answer":
        real &= segment_ids == ANSWER_SEGMENT
    own = facts.observing_tokens
    return last_rows(real, own if observing_tokens is None or own == 0 else observing_tokens)


def select_tokens(
    method: str,
    budget: Budget,
    segment_ids: Tensor,
    attention_mask: Tensor,
    *,
    mask_first_token: bool = True,
    observed: Observed | None = None,
    rkv_lambda: float = 0.1,
    draws: Tensor | None = None,
) -> Selection:
    """Choose the positions to distil, each row on its own.

    Args:
        method: Of :data:`kvds.config.selection_methods.SELECTION_METHODS`: every real token, those of ``CHOICES``, or
            those of the largest :func:`kvds.kv.scores.token_scores`. Methods that keep a window take their observing
            tokens first (the latest, where the budget is smaller than the window).
        budget: Tokens per row (int), a fraction of the row's real length in (0, 1] (float), or None with ``full``. A
            row with fewer eligible tokens keeps all of them.
        segment_ids: ``[B, T]``, 0 = padding.
        attention_mask: ``[B, T]``, 1 = real token.
        mask_first_token: Leave out each row's first real token, an attention sink.
        observed: Keys and query rows of the model whose attention decides, captured at :func:`observing_rows`.
        rkv_lambda: Weight of importance against redundancy.
        draws: ``[B]`` from :func:`kvds.kv.draws.row_draws`, for ``random``.

    Returns:
        The selection, on the same device; no host sync.

    Raises:
        InputError: unknown method, or a budget that keeps no token.
        ValueError: ``observed`` or ``draws`` is missing where the method reads it.
    """
    _check(method, budget)
    facts = SELECTION_METHODS[method]
    real = attention_mask.bool() & (segment_ids != 0)
    eligible = _eligible(segment_ids, attention_mask, mask_first_token)
    if not facts.budget:
        return Selection(None, eligible)
    tokens = eligible.shape[1]
    kept = _kept(real.sum(1), budget, tokens)
    if not facts.reads_keys:
        drawn = token_draws(draws, real) if facts.draws and draws is not None else None
        chosen = CHOICES[method](eligible, kept, drawn)
    else:
        if observed is None:
            raise ValueError(f"kv_method={method} reads observed keys and query rows")
        scores = token_scores(method, observed, real, rkv_lambda=rkv_lambda)
        if facts.keeps_window:
            scores = scores.masked_fill(observed.rows.at(tokens), torch.inf)
        chosen = _best(eligible, kept, scores)
    return _compact(chosen, min(row_budget(budget, tokens), tokens))


def selected_count(method: str, budget: Budget, length: int, *, mask_first_token: bool = True) -> int:
    """How many positions of a row with ``length`` real tokens :func:`select_tokens` marks True."""
    _check(method, budget)
    eligible = max(0, length - 1) if mask_first_token else length
    everything = length == 0 or not SELECTION_METHODS[method].budget
    return eligible if everything else min(row_budget(budget, length), eligible)


def selected_shares(selection: Selection, segment_ids: Tensor, segments: dict[str, int]) -> dict[str, Tensor]:
    """Selected tokens over real tokens, from 0 to 1.

    Args:
        selection: Positions that count.
        segment_ids: ``[B, T]``, 0 = padding.
        segments: Name → id of the segments to tell apart.

    Returns:
        ``kv/selected_share`` and ``kv/selected_share_NAME``, without those of which the batch holds no token. Asks the
        device which those are: for logging steps.
    """
    of_slots = segment_ids if selection.index is None else segment_ids.gather(1, selection.index)
    counts = {"kv/selected_share": (segment_ids != 0, of_slots != 0)}
    counts |= {f"kv/selected_share_{name}": (segment_ids == i, of_slots == i) for name, i in segments.items()}
    return {
        key: (selection.mask & slots).sum() / tokens.sum() for key, (tokens, slots) in counts.items() if tokens.any()
    }
