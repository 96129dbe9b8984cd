"""The output folder of a run: opened fresh or to go on, never mixed with another run's checkpoints."""

from __future__ import annotations

from pathlib import Path

from torch import distributed as dist

from kvds.checkpoint import choose_checkpoint
from kvds.checkpoint_folder import CHECKPOINTS, resumable_steps, saved_steps
from kvds.config import RunConfig
from kvds.config_resume import check_resumable
from kvds.durable_files import remove_leftovers
from kvds.errors import InputError
from kvds.output_folder import check_resume_folder, check_writable, make_folder


def find_checkpoint(cfg: RunConfig) -> int | None:
    """Say which checkpoint of the output folder to go on from; writes nothing; all ranks call it.

    Returns:
        Its step, or None to start fresh.

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
        check_resumable(cfg, folder / "config.yaml")
    dist.barrier()  # every rank has looked before one writes
    return choose_checkpoint(folder) if there else None


def open_run_folder(cfg: RunConfig, step: int | None, *, main_rank: bool) -> None:
    """Make the output folder and write ``config.yaml``; all ranks call it.

    A run that starts fresh sets the checkpoints of an earlier one aside as ``checkpoints-1`` and so on: a later
    ``--resume auto`` must not take them for this run's.

    Args:
        cfg: The run.
        step: What :func:`find_checkpoint` found.
        main_rank: Whether this rank writes.
    """
    folder = Path(cfg.output_dir)
    if main_rank:
        make_folder(folder)
        remove_leftovers(folder)
        remove_leftovers(folder / CHECKPOINTS)
        if step is None and saved_steps(folder):
            number = next(n for n in range(1, 1_000_000) if not (folder / f"{CHECKPOINTS}-{n}").exists())
            (folder / CHECKPOINTS).rename(folder / f"{CHECKPOINTS}-{number}")
        cfg.save(folder / "config.yaml")
    dist.barrier()
