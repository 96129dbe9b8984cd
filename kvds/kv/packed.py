"""A selection made sample by sample, brought to rows that several samples share."""

from __future__ import annotations

import torch
from torch import Tensor

from kvds.kv.select import Selection


def packed_selection(
    selection: Selection, token_index: Tensor, token_mask: Tensor, *, rows: int, tokens: int, samples_per_row: int
) -> Selection:
    """The positions that ``selection`` names, in the layout of the packed rows.

    Args:
        selection: Of ``N`` samples, a row each: index ``[N, M]`` or None, mask ``[N, M]``.
        token_index: ``[N, S]`` int64, flat positions in ``[rows · tokens]`` of each sample's tokens.
        token_mask: ``[N, S]`` bool, True where the sample has a token.
        rows: Packed rows.
        tokens: Tokens of a packed row.
        samples_per_row: Most samples in one row, which bounds how many positions a row can have.

    Returns:
        Index ``[rows, min(tokens, M · samples_per_row)]``, ascending, or None as given; its mask. No host sync.
    """
    chosen = selection.mask
    if selection.index is not None:
        chosen = torch.zeros_like(token_mask).scatter_(1, selection.index, selection.mask)
    # What a sample does not have goes to a place of its own behind the rows.
    places = torch.where(token_mask, token_index, rows * tokens)
    flat = chosen.new_zeros(rows * tokens + 1).scatter_(0, places.flatten(), (chosen & token_mask).flatten())
    mask = flat[:-1].view(rows, tokens)
    if selection.index is None:
        return Selection(None, mask)
    slots = min(tokens, selection.index.shape[1] * samples_per_row)
    first = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :slots]
    index = first.sort(dim=1).values
    return Selection(index, mask.gather(1, index))
