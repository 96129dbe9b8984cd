"""Groups of layers and heads, and rows of a tensor at chosen positions."""

from __future__ import annotations

from torch import Tensor

from kvds.errors import InputError


def group_slices(count: int, groups: int, *, what: str = "layer_groups") -> list[slice]:
    """Cut ``count`` layers or heads into ``groups`` runs whose sizes differ by at most one.

    Raises:
        InputError: fewer things than groups.
    """
    if not 1 <= groups <= count:
        raise InputError(f"{what}={groups}: expected a number from 1 to {count}, so that no group is empty")
    bounds = [group * count // groups for group in range(groups + 1)]
    return [slice(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]


def rows_to_read(states: Tensor, index: Tensor | None) -> Tensor | None:
    """``index``, or None where ``states [B, H, …, D]`` hold the rows of ``index [B, M]`` alone and in its order.

    That is where they have M rows: an ascending index of M out of M positions names them all in order.
    """
    return None if index is None or states.shape[2] == index.shape[1] else index


def gather_positions(states: Tensor, index: Tensor | None) -> Tensor:
    """``[B, H, T, D]`` at ``index [B, M]`` → ``[B, H, M, D]``; the tensor itself (no copy) without an index, and where
    it has been gathered already.
    """
    index = rows_to_read(states, index)
    if index is None:
        return states
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
