"""The process group of a run: joined, left, summed over."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch import distributed as dist

from kvds.distributed.operation_builds import guard_builds
from kvds.distributed.rank_environment import adopt_slurm_ranks, free_port
from kvds.errors import RunError, one_line

_T = TypeVar("_T")
# Words of a collective's error where another rank has ended, or the way to it.
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Read error")


def init_distributed() -> torch.device:
    """Join the process group that the launcher or ``srun`` describes (alone where neither does) and return this rank's
    device.

    Raises:
        RunError: the other ranks did not come.
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
    with ranks_meet():
        deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
        if accelerator.device_name() == "cpu":
            _unlink_shared_buffer()
    return torch.device(accelerator.current_device_name())


@contextlib.contextmanager
def ranks_meet() -> Iterator[None]:
    """Within it ranks join each other, and none yet watches over them.

    Raises:
        RunError: one ended on the way, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in LOST_CONNECTION):
            raise
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        known = ", ".join(f"{name}={one_line(os.environ.get(name, 'none'))}" for name in names)
        told = RunError(
            f"the ranks did not meet ({one_line(error)}): one of them ended before all had joined, or MASTER_ADDR "
            f"cannot be reached; here are {known} (look at the other ranks' logs; kvds doctor tries the network out; "
            "DEEPSPEED_TIMEOUT has the minutes to wait)"
        )
        if os.environ.get("RANK", "0") != "0" and os.environ.get("LOCAL_RANK", "0") == "0":
            # Rank 0, which tells all else, may be the one that is gone.
            print(f"kvds: error: {told}", file=sys.stderr, flush=True)
        raise told from error


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
    """Wait for all ranks and leave the process group, so that no rank ends while another still talks to it.

    Raises:
        RunError: another rank was gone before.
    """
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError as error:
            raise RunError("another rank was gone at the end, when all was saved (its own log says why)") from error
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
