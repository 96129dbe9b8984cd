"""Start of a following map before step 1: the closed-form fit to the first batches, the same on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import deepspeed
import torch
from torch import nn

from kvds.data.batches import TokenBatch
from kvds.data.encoding import Segment
from kvds.distributed.process_group import all_reduce_sum
from kvds.handoff.cache_map import CacheMap
from kvds.handoff.fitting import fit_map
from kvds.handoff.following_map import FollowingMap
from kvds.handoff.moments import MapMoments
from kvds.handoff.reading import read_states
from kvds.kv import KVStates

log = logging.getLogger("kvds")


@torch.no_grad()
def start_following_map(
    follower: FollowingMap,
    student: nn.Module,
    batches: Iterable[TokenBatch],
    teacher_states: Callable[[TokenBatch], KVStates],
) -> None:
    """Fit ``follower`` to the prompts of some batches; before the engine is built.

    Args:
        follower: On its device, not yet sharded.
        student: Sharded by ZeRO-3 or whole. Its parameters are gathered for these forwards only.
        batches: This rank's, equally many on every rank.
        teacher_states: From a batch to the teacher's keys and values of all its tokens.
    """
    device = next(follower.buffers()).device
    fitted = CacheMap(follower.teacher, follower.student, follower.sources).to(device)
    moments = MapMoments(fitted, device)
    was_training = student.training
    student.eval()
    sharded = [p for p in student.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        for batch in batches:
            own = read_states(student, batch.input_ids, batch.attention_mask.bool())
            prompts = (batch.segment_ids == Segment.PROMPT) & (batch.sample_ids >= 0)[:, None]
            moments.update(teacher_states(batch), own, prompts, batch.sample_ids.clamp_min(0) % 2)
    student.train(was_training)
    moments.reduce(all_reduce_sum)
    fit = fit_map(fitted, moments, remedy="more --calibration_batches")
    follower.start(fitted, moments)
    log.info(
        "handoff: the map starts with R² %s on prompts that it was not fitted to",
        ", ".join(f"{value:.3f} ({part})" for part, value in fit.mean_r2.items()),
    )
