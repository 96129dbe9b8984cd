"""What a run leaves on disk: DeepSpeed checkpoints to resume from, a plain student, and ``map_aligner.pt``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch

from kvds.checkpoint.folder import CHECKPOINTS, resumable_steps, step_tag
from kvds.checkpoint.manifest import folder_faults
from kvds.checkpoint.origin import read_origin
from kvds.checkpoint.universal import load_on_other_ranks
from kvds.errors import InputError

log = logging.getLogger("kvds")


def choose_checkpoint(run_dir: Path) -> int | None:
    """The step of the checkpoint to go on from: the latest whole one; all ranks call it and read a share of the files.

    A checkpoint that is not as its manifest says is named in a warning and the one before is taken. Nothing is
    unpickled here, and nothing that fails here is unpickled later.

    Returns:
        The step, the same on all ranks, or None where the run has no checkpoint.

    Raises:
        InputError: there are checkpoints and none is whole, or ``latest`` names something else.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    steps = [resumable_steps(run_dir)]
    torch.distributed.broadcast_object_list(steps, src=0)  # all ranks try the same ones
    told = ""
    for step in steps[0]:
        mine = folder_faults(run_dir / CHECKPOINTS / step_tag(step), part=rank, parts=world)
        everyone: list[Any] = [None] * world
        torch.distributed.all_gather_object(everyone, mine)
        faults = [fault for of_rank in everyone for fault in of_rank]
        if not faults:
            return step
        fault = f"{run_dir / CHECKPOINTS / step_tag(step)}: not whole, {faults[0]}"
        log.warning("%s; the checkpoint before is taken", fault)
        told = told or fault
    if told:
        raise InputError(f"{told}, and none before it is whole; expected a whole checkpoint (or --resume never)")
    return None


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, run_dir: Path, step: int) -> dict[str, Any]:
    """Restore the engine from ``checkpoints/step-NNNNNN``, which any number of ranks may have written, and return the
    ``state`` that was saved with it; all ranks call it.
    """
    other_ranks = read_origin(run_dir, step).ranks != torch.distributed.get_world_size()
    if other_ranks and engine.zero_optimization_stage() > 0:  # stage 0 has no shards
        return load_on_other_ranks(engine, run_dir, step)["kvds"]
    path, client = engine.load_checkpoint(str(run_dir / CHECKPOINTS), tag=step_tag(step))
    if path is None:
        raise InputError(
            f"{run_dir / CHECKPOINTS / step_tag(step)}: DeepSpeed could not load it; expected a whole checkpoint"
        )
    return client["kvds"]
