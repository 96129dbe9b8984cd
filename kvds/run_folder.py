"""The output folder of a run: opened fresh or to go on, never mixed with another run's checkpoints."""

from __future__ import annotations

from pathlib import Path

from torch import distributed as dist

from kvds.checkpoint import choose_checkpoint
from kvds.checkpoint_folder import CHECKPOINTS, resumable_steps, saved_steps
from kvds.config import RunConfig
from kvds.durable_files import remove_leftovers
from kvds.errors import InputError
from kvds.output_folder import check_resume_folder, check_writable, make_folder


def open_run_folder(cfg: RunConfig, *, main_rank: bool) -> int | None:
    """Make the output folder, write ``config.yaml`` and say which checkpoint to go on from; all ranks call it.

    With ``--resume never`` the checkpoints of an earlier run are set aside as ``checkpoints-1`` and so on: a later
    ``--resume auto`` must not take them for this run's.

    Returns:
        The step of the checkpoint to resume, or None to start fresh.

    Raises:
        InputError: nothing to resume where a folder is named, or a run of other settings.
    """
    folder = Path(cfg.output_dir)
    check_writable(folder)
    named = check_resume_folder(cfg)
    there = cfg.resume != "never" and bool(resumable_steps(folder))
    if named and not there:
        raise InputError(f"resume={cfg.resume}: no checkpoint there; expected checkpoints/latest (or --resume auto)")
    if there:
        cfg.check_resumable(folder / "config.yaml")
    dist.barrier()  # every rank has looked before one writes
    step = choose_checkpoint(folder) if there else None
    if main_rank:
        make_folder(folder)
        remove_leftovers(folder)
        remove_leftovers(folder / CHECKPOINTS)
        if step is None and saved_steps(folder):
            number = next(n for n in range(1, 1_000_000) if not (folder / f"{CHECKPOINTS}-{n}").exists())
            (folder / CHECKPOINTS).rename(folder / f"{CHECKPOINTS}-{number}")
        cfg.save(folder / "config.yaml")
    dist.barrier()
    return step
