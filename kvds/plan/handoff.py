"""Handoff in a plan: what a step with ``--handoff_weight`` is given, on fake tensors, and what its map's fit takes."""

from __future__ import annotations

import torch

from kvds.config import RunConfig
from kvds.data.labels import LabelledPositions
from kvds.handoff.cache_map import CacheMap
from kvds.handoff.continuation import Continuation
from kvds.handoff.following_map import FollowingMap, following_map
from kvds.handoff.moments import CHUNK, MapMoments
from kvds.kv import KVShape
from kvds.plan.batch_shape import BatchShape

_FP64 = 8


def planned_map(cfg: RunConfig, teacher: KVShape, student: KVShape, dtype: torch.dtype) -> FollowingMap:
    """The map that a run trains: weights in the dtype of the models, units in fp32.

    Raises:
        InputError: it asks for more layers than the teacher has.
    """
    found = following_map(teacher, student, cfg.handoff_source_layers)
    for parameter in found.parameters():
        parameter.data = parameter.data.to(dtype)
    return found


def map_size(cfg: RunConfig, teacher: KVShape, student: KVShape) -> int:
    """Learned numbers of the map; 0 without handoff."""
    if not cfg.handoff_weight:
        return 0
    with torch.device("meta"):
        return sum(p.numel() for p in planned_map(cfg, teacher, student, torch.float32).parameters())


def map_flops(cfg: RunConfig, teacher: KVShape, student: KVShape) -> float:
    """FLOPs per token of a prompt, forward and backward: of weights alone, as states have no gradient."""
    return 4.0 * map_size(cfg, teacher, student)


def planned_continuation(batch: BatchShape) -> Continuation:
    """Where tokens go, with as many of each kind as ``batch`` has."""
    slots, follow = (torch.zeros(batch.rows, count, dtype=torch.int64) for count in (batch.handed, batch.follow))
    labelled = torch.zeros(batch.labelled, dtype=torch.int64)
    return Continuation(slots, slots == 0, follow, follow == 0, LabelledPositions(labelled, labelled))


def map_fitting_bytes(cfg: RunConfig, teacher: KVShape, student: KVShape, batch: BatchShape, element: int) -> int:
    """What the start of the map takes beside the states that it is fitted to: the sums of both halves, and the larger
    of the rows of one half side by side and the matrices of one solution.
    """
    with torch.device("meta"):
        follower = following_map(teacher, student, cfg.handoff_source_layers)
        cache_map = CacheMap(teacher, student, follower.sources)
        moments = MapMoments(cache_map, torch.device("meta"))
    groups = [group for some in moments.groups.values() for group in some]
    sums = sum(_FP64 * tensor.numel() for group in groups for tensor in group.sums)
    source = cache_map.weight("keys").shape[1]
    target = max(group.width * len(group.layers) for group in groups)
    positions = -(-batch.rows // 2) * (batch.handed + 1)
    widths = [shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim for shape in (teacher, student)]
    picked = element * positions * (sum(widths) + source + target)
    rows = picked + _FP64 * min(positions, CHUNK) * (source + 2 * target)
    solution = _FP64 * source * (7 * source + 6 * target)
    return sums + max(rows, solution)
