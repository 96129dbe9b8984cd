"""Random numbers of a token that depend on seed, step, sample and place alone: no generator, no order of calls.

Whole-number hashing gives the same draw on any device, on any rank, in any company, and after a resume.
"""

from __future__ import annotations

from torch import Tensor

_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # of splitmix64, as signed numbers


def _mixed(x: Tensor) -> Tensor:
    """A bijection of int64 in which each bit of the input moves about half of the output's (multiplication wraps)."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * multiplier  # >> keeps the sign: cut it off
    return x ^ ((x >> 31) & (2**33 - 1))


def row_draws(seed: int, step: int, sample_ids: Tensor) -> Tensor:
    """``[B]`` int64, a number for each sample of a step.

    Args:
        seed: Of the run.
        step: Optimizer step, so that another epoch draws anew.
        sample_ids: ``[B]`` int64.
    """
    # Two rounds, so that neighbouring seeds, steps and samples share nothing.
    return _mixed(_mixed(sample_ids + (seed * 1_000_003 + step) % 2**62))


def token_draws(rows: Tensor, real: Tensor) -> Tensor:
    """``[B, T]`` int64 numbers of at least 0, one for each token by its place among the real ones of its row.

    Args:
        rows: ``[B]`` from :func:`row_draws`.
        real: ``[B, T]`` bool.
    """
    return _mixed(rows.unsqueeze(1) ^ _mixed(real.cumsum(1))) & (2**62 - 1)
