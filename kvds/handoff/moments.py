"""Moments of teacher rows and student rows, summed batch by batch: all that a cache map is fitted from.

Memory does not grow with the text. Student layers that read the same teacher layers share one matrix of products; in
all, with ``w`` numbers per token and layer, fp64, two halves, keys and values each:
``groups · (S w_t)² + L_s · S w_t · w_s`` numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from kvds.align.ridge import Moments
from kvds.errors import InputError
from kvds.handoff.cache_map import CacheMap
from kvds.handoff.products import heads_side_by_side
from kvds.kv import KVStates
from kvds.kv.states import KV_PARTS

CHUNK = 2048
"""Rows in fp64 at a time."""
_LEAST_DEVIATION = 1e-6  # of a channel, as a part of the largest one's


class LayerGroup:
    """Sums over the rows of a run of student layers that read the same teacher layers, in two halves.

    Args:
        sources: The teacher layers.
        layers: The student layers.
        widths: Numbers per row of the teacher layers together, and of one student layer.
        device: Of the sums.
    """

    def __init__(
        self, sources: tuple[int, ...], layers: list[int], widths: tuple[int, int], device: torch.device
    ) -> None:
        self.sources, self.layers, self.width = sources, layers, widths[1]
        source, target = widths[0], widths[1] * len(layers)

        def zeros(*size: int) -> Tensor:
            return torch.zeros(2, *size, dtype=torch.float64, device=device)

        self._count, self._x, self._y = zeros(), zeros(source), zeros(target)
        self._xx, self._xy, self._yy = zeros(source, source), zeros(source, target), zeros(target)

    def add(self, half: int, x: Tensor, y: Tensor) -> None:
        """Add rows ``[N, S · w_t]`` and ``[N, layers · w_s]``, fp64."""
        self._count[half] += len(x)
        self._x[half] += x.sum(0)
        self._y[half] += y.sum(0)
        self._yy[half] += y.square().sum(0)
        self._xx[half].addmm_(x.T, x)
        self._xy[half].addmm_(x.T, y)

    @property
    def sums(self) -> list[Tensor]:
        """All of them, to be summed over ranks in place."""
        return [self._count, self._x, self._y, self._xx, self._xy, self._yy]

    @property
    def deviation(self) -> Tensor:
        """``[S · w_t]`` standard deviation of each source channel; never 0."""
        count = self._count.sum()
        mean = self._x.sum(0) / count
        deviation = (self._xx.sum(0).diagonal() / count - mean.square()).clamp_min(0).sqrt()
        return deviation.clamp_min(_LEAST_DEVIATION * deviation.max()) if deviation.any() else deviation + 1

    def moments(self, half: int | None, unit: Tensor) -> Moments:
        """Of one half, or of all rows, all layers side by side; source channels in units of ``unit``.

        ``yy`` holds a variance per channel, which :func:`of_layer` sums.
        """
        rows = slice(None) if half is None else slice(half, half + 1)
        count = self._count[rows].sum()
        at_least_one = count.clamp_min(1)
        x, y = (sums[rows].sum(0) / at_least_one for sums in (self._x, self._y))
        return Moments(
            count, x / unit, y,
            xx=(self._xx[rows].sum(0) / at_least_one - torch.outer(x, x)) / torch.outer(unit, unit),
            xy=(self._xy[rows].sum(0) / at_least_one - torch.outer(x, y)) / unit[:, None],
            yy=self._yy[rows].sum(0) / at_least_one - y.square(),
        )  # fmt: skip


def of_layer(moments: Moments, columns: slice) -> Moments:
    """One student layer of the group's."""
    return moments._replace(y=moments.y[columns], xy=moments.xy[:, columns], yy=moments.yy[columns].clamp_min(0).sum())


class MapMoments:
    """Moments of calibration rows for a map: :meth:`update` per batch, then :func:`kvds.handoff.fitting.fit_map`.

    Args:
        cache_map: Read for its shapes and sources.
        device: Where batches are and sums are kept.
    """

    def __init__(self, cache_map: CacheMap, device: torch.device) -> None:
        self._map = cache_map
        teacher = cache_map.teacher
        widths = len(cache_map.sources[0]) * teacher.num_key_value_heads * teacher.head_dim, cache_map.width
        runs = [
            (sources, [layer for layer, _ in run])
            for sources, run in groupby(enumerate(cache_map.sources), key=lambda one: one[1])
        ]
        self.groups = {part: [LayerGroup(*run, widths, device) for run in runs] for part in KV_PARTS}
        self.rows = [0, 0]
        self._device = device

    def reduce(self, all_reduce: Callable[[Tensor], None]) -> None:
        """Sum over ranks in place; every rank makes the same calls, whatever its batches held."""
        for groups in self.groups.values():
            for group in groups:
                for tensor in group.sums:
                    all_reduce(tensor)
        rows = torch.tensor(self.rows, device=self._device)
        all_reduce(rows)
        self.rows = rows.tolist()

    @torch.no_grad()
    def update(self, teacher: KVStates, student: KVStates, mask: Tensor, halves: Tensor) -> None:
        """Add the rows of a batch.

        Args:
            teacher: Its keys, before the rotary embedding, and values.
            student: The student's, of the same text.
            mask: ``[B, T]`` bool, which positions count.
            halves: ``[B]`` 0 or 1, the half that a text belongs to: each judges what is fitted to the other.

        Raises:
            InputError: shapes that are not the map's, or states that are not finite.
        """
        teacher.check(self._map.teacher, side="handoff: the teacher")
        student.check(self._map.student, side="handoff: the student")
        for part, groups in self.groups.items():
            for side, states in (("teacher", teacher), ("student", student)):
                if not all(bool(layer.transpose(1, 2)[mask].isfinite().all()) for layer in getattr(states, part)):
                    raise InputError(
                        f"handoff: the {side}'s {part} are not finite; expected weights that compute finite states (is "
                        "its checkpoint whole, its dtype bf16 or fp32?)"
                    )
            for half in (0, 1):
                kept = mask & (halves == half)[:, None]
                x, y = ([heads_side_by_side(layer)[kept] for layer in getattr(s, part)] for s in (teacher, student))
                if part == KV_PARTS[0]:
                    self.rows[half] += len(x[0])
                for group in groups:
                    source = torch.cat([x[layer] for layer in group.sources], -1)
                    target = torch.cat([y[layer] for layer in group.layers], -1)
                    for some, others in zip(source.split(CHUNK), target.split(CHUNK), strict=True):
                        group.add(half, some.double(), others.double())
