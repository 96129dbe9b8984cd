"""The process group of a run: joined, left, summed over."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch import distributed as dist

from kvds.distributed.operation_builds import guard_builds
from kvds.distributed.rank_environment import adopt_slurm_ranks, free_port

_T = TypeVar("_T")


def init_distributed() -> torch.device:
    """Join the process group that the launcher or ``srun`` describes (alone where neither does) and return this rank's
    device.
    """
    adopt_slurm_ranks()
    guard_builds()
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    if os.environ["WORLD_SIZE"] == "1" and not dist.is_initialized():
        # Alone there is nobody to meet: a port, which another run may take in the meantime, is not needed.
        dist.init_process_group(accelerator.communication_backend_name(), store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    if accelerator.device_name() == "cpu":
        _unlink_shared_buffer()
    return torch.device(accelerator.current_device_name())


def _unlink_shared_buffer() -> None:
    """Take the name off this rank's share of the memory through which the CPU ranks of a node talk.

    DeepSpeed never does (``ops/csrc/cpu/comm/shm.cpp``, 0.19.8), so that each rank of each launch leaves 66 MiB of the
    node's memory in ``/dev/shm``, until that is full. Ranks that have it open keep it, and it goes with the last of
    them, also when they are killed.
    """
    dist.barrier()  # every rank has opened those of the others
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def leave_distributed() -> None:
    """Wait for all ranks and leave the process group, so that no rank ends while another still talks to it."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> None:
    """Sum ``tensor`` over all ranks in place."""
    dist.all_reduce(tensor)


def all_reduce_max(tensor: Tensor) -> None:
    """Take the maximum of ``tensor`` over all ranks in place."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)


def from_first_rank(make: Callable[[], _T]) -> _T:
    """What ``make`` returns on rank 0, on every rank; all call it, and what it raises there all of them raise."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = make()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]
