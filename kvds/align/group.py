"""One aligner for each of several teachers, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kvds.align.aligner import KVAligner


class AlignerGroup(nn.Module):
    """Aligners of several teachers under one name, so that they are trained, saved and resumed together.

    Its members are called one by one: only one teacher's keys and values need to be there at a time.

    Args:
        members: One a teacher, in order.
        weights: Factor of each teacher's KV loss.

    Attributes:
        members: As given.
        weights: As given.
        reads: What of the student the members read, the same for all (:func:`kvds.kv.open_capture`).
    """

    def __init__(self, members: Sequence[KVAligner], weights: Sequence[float]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = tuple(float(weight) for weight in weights)
        self.reads = members[0].reads


def members_of(aligner: nn.Module) -> list[tuple[float, KVAligner]]:
    """Weight and aligner of each teacher; a lone aligner has weight 1."""
    if isinstance(aligner, AlignerGroup):
        return list(zip(aligner.weights, aligner.members, strict=True))  # type: ignore[arg-type]
    return [(1.0, aligner)]  # type: ignore[list-item]
