"""A checkpoint of some number of ranks, loaded on another: through DeepSpeed's universal form, made for this one load.

DeepSpeed 0.19.8 turns shards into whole tensors of each parameter and its Adam moments, and deals those out anew. What
it leaves undone is done here: every parameter group gets the first one's learning rate and weight decay; all moments of
stage 3 share one step counter on the host, which a step then raises once for each of them; and what no optimizer moves
(buffers, frozen parameters) stays as it was built.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch import distributed as dist

from kvds.checkpoint.folder import CHECKPOINTS, step_tag
from kvds.durable_files import UNFINISHED
from kvds.errors import RunError

log = logging.getLogger("kvds")


def load_on_other_ranks(engine: deepspeed.DeepSpeedEngine, run_dir: Path, step: int) -> dict[str, Any]:
    """Restore an engine of ZeRO stage 1 to 3 with Adam from a checkpoint that another number of ranks has written; all
    ranks call it.

    Args:
        engine: Freshly built.
        run_dir: The run's ``--output_dir``, in a file system that all ranks see.
        step: The checkpoint, whose manifest has been checked: its shards are unpickled.

    Returns:
        DeepSpeed's client state.

    Raises:
        RunError: it could not be converted, such as for want of disk space.
    """
    folder = _convert(run_dir, step)
    optimizer = engine.basic_optimizer
    as_built = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        path, client = engine.load_checkpoint(str(folder), tag=step_tag(step))
    finally:
        engine._config.load_universal_checkpoint = False
    if path is None:
        raise RunError(f"{run_dir / CHECKPOINTS / step_tag(step)}: DeepSpeed could not load it on other ranks")
    for group, built, lr in zip(optimizer.param_groups, as_built, engine.lr_scheduler.get_last_lr(), strict=True):
        group.update(built | {"lr": lr})
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            # The fused kernel reads the counter on the device, the others on the host.
            device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
            state["step"] = state["step"].to(device, copy=True)
    _restore_what_no_optimizer_moves(engine, run_dir / CHECKPOINTS / step_tag(step))
    dist.barrier()  # every rank has read what the first one removes
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return client


def _convert(run_dir: Path, step: int) -> Path:
    """Write the universal form of a checkpoint into a folder of its own, which a crash leaves to the next start."""
    folder = run_dir / CHECKPOINTS / f"universal{UNFINISHED}"
    fault = None
    if dist.get_rank() == 0:
        from deepspeed.checkpoint import ds_to_universal

        shutil.rmtree(folder, ignore_errors=True)
        source, target = run_dir / CHECKPOINTS / step_tag(step), folder / step_tag(step)
        log.info("%s: its shards are dealt out to %d ranks", source, dist.get_world_size())
        # One worker: no process is forked from one that trains.
        arguments = argparse.Namespace(
            input_folder=str(source), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=False,
        )  # fmt: skip
        try:
            target.mkdir(parents=True)
            with contextlib.redirect_stdout(io.StringIO()):  # it tells each of its steps
                ds_to_universal.main(arguments)
        except Exception as error:  # the other ranks wait for the answer, whatever it is
            fault = " ".join(str(error).split())[:300] or type(error).__name__
            if "unexpected pos" in fault or "failed writing" in fault:  # how torch's archive tells of a full disk
                fault = "a file could not be written whole"
            shutil.rmtree(folder, ignore_errors=True)
    told = [fault]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise RunError(
            f"{run_dir / CHECKPOINTS / step_tag(step)}: could not be converted for {dist.get_world_size()} ranks "
            f"({told[0]}); the checkpoint is as it was (make room, or start as many ranks as have written it)"
        )
    return folder


@torch.no_grad()
def _restore_what_no_optimizer_moves(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    files = sorted(folder.glob("*_model_states.pt"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    shards = [torch.load(path, map_location="cpu", weights_only=False, mmap=True) for path in files]
    module = shards[0]["module"]
    for name, buffer in engine.module.named_buffers():
        if name in module:
            buffer.copy_(module[name])
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        sharded = hasattr(parameter, "ds_id")
        whole = module[name]
        if sharded:
            flat = torch.cat([shard["frozen_param_fragments"][name].flatten() for shard in shards])
            whole = flat[: parameter.ds_numel].view(parameter.ds_shape)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
            parameter.copy_(whole)
