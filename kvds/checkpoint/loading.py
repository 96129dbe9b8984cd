"""Checkpoints loaded into an engine, also those that another number of ranks wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch

from kvds.checkpoint.folder import CHECKPOINTS, step_tag
from kvds.checkpoint.origin import read_origin
from kvds.checkpoint.universal import load_on_other_ranks
from kvds.errors import InputError


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
