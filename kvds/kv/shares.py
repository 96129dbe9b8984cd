"""How much of a batch a selection keeps, in all and of each segment."""

from __future__ import annotations

from torch import Tensor

from kvds.kv.select import Selection


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
