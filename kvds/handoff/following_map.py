"""The following map: a cache map that keeps up with a student in training.

It is trained to give the student's own keys and values of the prompts, which are its target without a gradient:
trained together they would meet where it is easiest, near nothing, with the prettiest of losses. The student in turn is
trained on answers that it writes from the mapped cache, in which the map has no gradient: it learns to read what a map
can give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvds.handoff.cache_map import CacheMap, source_layers
from kvds.handoff.moments import MapMoments
from kvds.handoff.products import map_layers
from kvds.kv import KVShape, KVStates
from kvds.kv.states import KV_PARTS

SOURCE_LAYERS = 4
"""Teacher layers that a following map reads for each student layer, where nothing else is asked for."""


class FollowedCache(NamedTuple):
    """What a following map makes of a batch.

    A named tuple, since ZeRO-3 finds the tensors that leave a module only in tuples, lists and dicts.

    Attributes:
        states: The mapped keys and values, without a graph.
        loss: How far they are from the student's, scalar with a graph to the map.
    """

    states: KVStates
    loss: Tensor


class FollowingMap(nn.Module):
    """A :class:`CacheMap` whose weights are in units of both sides' deviation, so that one learning rate suits them.

    Args:
        teacher: As of :class:`CacheMap`.
        student: Likewise.
        sources: Likewise.
    """

    def __init__(self, teacher: KVShape, student: KVShape, sources: Sequence[Sequence[int]]) -> None:
        super().__init__()
        with torch.device("meta"):  # for its checks and sizes
            like = CacheMap(teacher, student, sources)
        self.teacher, self.student, self.sources = teacher, student, like.sources
        layers, source, width = like.weight(KV_PARTS[0]).shape
        for part in KV_PARTS:
            setattr(self, f"{part}_weight", nn.Parameter(torch.zeros(layers, source, width)))
            setattr(self, f"{part}_bias", nn.Parameter(torch.zeros(layers, width)))
            self.register_buffer(f"{part}_source_mean", torch.zeros(layers, source))
            self.register_buffer(f"{part}_source_unit", torch.ones(layers, source))
            self.register_buffer(f"{part}_target_mean", torch.zeros(layers, width))
            self.register_buffer(f"{part}_target_unit", torch.ones(layers))

    def _of(self, part: str, name: str) -> Tensor:
        found: Tensor = getattr(self, f"{part}_{name}")
        return found

    @torch.no_grad()
    def start(self, fitted: CacheMap, moments: MapMoments) -> None:
        """Begin as ``fitted``, in the units of the rows that it was fitted to."""
        for part, groups in moments.groups.items():
            for group in groups:
                unit = group.deviation
                whole = group.moments(None, unit)
                for place, layer in enumerate(group.layers):
                    columns = slice(place * group.width, (place + 1) * group.width)
                    deviation = whole.yy[columns].clamp_min(0).mean().sqrt()
                    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
                    raw, offset = (side(part)[layer].double() for side in (fitted.weight, fitted.bias))
                    source_mean, target_mean = whole.x * unit, whole.y[columns]
                    values = {
                        "source_mean": source_mean, "source_unit": unit, "target_mean": target_mean,
                        "target_unit": deviation, "weight": unit[:, None] * raw / deviation,
                        "bias": (offset + source_mean @ raw - target_mean) / deviation,
                    }  # fmt: skip
                    for name, value in values.items():
                        self._of(part, name)[layer].copy_(value)

    def folded(self, part: str) -> tuple[Tensor, Tensor]:
        """Weight and bias as those of a :class:`CacheMap`, at least fp32."""
        wide = self._of(part, "source_unit").dtype
        unit, deviation = self._of(part, "source_unit"), self._of(part, "target_unit")[:, None]
        weight = self._of(part, "weight").to(wide) / unit[..., None] * deviation[..., None]
        offset = torch.einsum("lx,lxy->ly", self._of(part, "source_mean"), weight)
        return weight, self._of(part, "bias").to(wide) * deviation + self._of(part, "target_mean") - offset

    def forward(self, teacher: KVStates, student: KVStates, mask: Tensor, scale: float = 1.0) -> FollowedCache:
        """Map the teacher's keys and values of some positions.

        ``loss = scale · Σ over positions of the mean over layers, channels, keys and values of ((mapped − own) /
        target_unit)²``.

        Args:
            teacher: Per layer ``[B, H_t, P, D_t]``, keys before the rotary embedding.
            student: Its own, detached by whoever wants nothing to collapse.
            mask: ``[B, P]`` bool, the positions that count.
            scale: Of the loss.
        """
        mapped, terms = [], []
        heads = self.student.num_key_value_heads
        for part, own in zip(KV_PARTS, student, strict=True):
            found = map_layers(getattr(teacher, part), self.sources, *self.folded(part), heads)
            mapped.append(tuple(layer.detach() for layer in found))
            for layer, (x, y) in enumerate(zip(found, own, strict=True)):
                unit = self._of(part, "target_unit")[layer]
                error = ((x - y).to(unit.dtype) / unit).square().mean((1, 3))  # [B, P]
                terms.append(error.masked_fill(~mask, 0.0).sum())
        return FollowedCache(KVStates(*mapped), scale * torch.stack(terms).mean())

    @torch.no_grad()
    def as_cache_map(self) -> CacheMap:
        """The map as it is now, to be saved."""
        found = CacheMap(self.teacher, self.student, self.sources).to(self._of("keys", "source_unit").device)
        for part in KV_PARTS:
            weight, bias = self.folded(part)
            found.weight(part).copy_(weight)
            found.bias(part).copy_(bias)
        return found


def following_map(teacher: KVShape, student: KVShape, layers: int | None) -> FollowingMap:
    """The map of a pair, not fitted.

    Args:
        teacher: Of what is mapped.
        student: Of what comes out.
        layers: ``handoff_source_layers``.

    Raises:
        InputError: more layers than the teacher has.
    """
    depth = teacher.num_hidden_layers
    count = min(SOURCE_LAYERS, depth) if layers is None else layers
    sources = source_layers(student.num_hidden_layers, depth, count, flag="--handoff_source_layers")
    return FollowingMap(teacher, student, sources)
