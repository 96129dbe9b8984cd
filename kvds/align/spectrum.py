"""Singular values of the dimension maps: how many directions of the source a map passes on, and how evenly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvds.align.aligner import KVAligner


@torch.no_grad()
def map_spectra(aligner: KVAligner) -> dict[str, dict[str, Any]]:
    """The spectrum of each part's dimension maps, in the standardised units in which they are learned.

    Returns:
        Part → ``singular_values`` (nested lists ``[maps][min(D_x, D_y)]``, largest first; a map per layer, per layer
        and head in this order, or one where all share it) and ``directions`` (``[maps]``, ``exp`` of the entropy of the
        squared singular values' shares: how many directions carry the map). Parts without a map are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, part in aligner.named_parts().items():
        if part.projection is None:
            continue
        maps = part.projection.float().flatten(0, -3) if part.projection.dim() > 2 else part.projection.float()[None]
        values = torch.linalg.svdvals(maps)
        found[name] = {"singular_values": values.tolist(), "directions": directions(values).tolist()}
    return found


def directions(singular_values: Tensor) -> Tensor:
    """``exp(H(σ² / Σσ²))`` over the last dimension: between 1 and its length."""
    share = singular_values.square() / singular_values.square().sum(-1, keepdim=True).clamp_min(1e-30)
    return (-(share * share.clamp_min(1e-30).log()).sum(-1)).exp()
