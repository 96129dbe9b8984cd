"""The output folder of a run: opened fresh or to go on, never mixed with another run's checkpoints."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import distributed as dist

from kvds.checkpoint.folder import CHECKPOINTS, resumable_steps, saved_steps, step_tag
from kvds.checkpoint.manifest import folder_faults
from kvds.config import RunConfig
from kvds.config.resume_rules import check_resumable
from kvds.durable_files import remove_leftovers
from kvds.errors import InputError, one_line

log = logging.getLogger("kvds")


def find_checkpoint(cfg: RunConfig) -> int | None:
    """Say which checkpoint of the output folder to go on from; all ranks call it and read a share of the files.

    Returns:
        Its step, the same on all ranks, or None to start fresh.

    Raises:
        InputError: as :func:`checkpoints_to_try` and :func:`first_whole`.
    """
    steps = [checkpoints_to_try(cfg)]
    dist.barrier()  # every rank has looked before one writes
    dist.broadcast_object_list(steps, src=0)  # all ranks try the same ones
    return first_whole(Path(cfg.output_dir), steps[0], _faults_seen_by_all)


def checkpoints_to_try(cfg: RunConfig) -> list[int]:
    """The steps to go on from, best first; none: the run starts fresh. Writes nothing and asks no other rank.

    Raises:
        InputError: nothing to resume where a folder is named, or a run of other settings.
    """
    folder = Path(cfg.output_dir)
    check_writable(folder)
    named = check_resume_folder(cfg)
    steps = [] if cfg.resume == "never" else resumable_steps(folder)
    if named and not steps:
        raise InputError(f"resume={cfg.resume}: no checkpoint there; expected checkpoints/latest (or --resume auto)")
    if steps:
        check_resumable(cfg, folder / "config.yaml")
    return steps


def first_whole(
    run_dir: Path, steps: Sequence[int], faults_of: Callable[[Path], list[str]] = folder_faults
) -> int | None:
    """The first of the checkpoints that is as its manifest says, or None of none.

    One that is not is named in a warning. Nothing is unpickled here, and nothing that fails here is unpickled later.

    Raises:
        InputError: there are checkpoints and none is whole.
    """
    told = ""
    for step in steps:
        folder = run_dir / CHECKPOINTS / step_tag(step)
        if not (faults := faults_of(folder)):
            return step
        fault = f"{folder}: not whole, {faults[0]}"
        log.warning("%s; the checkpoint before is taken", fault)
        told = told or fault
    if told:
        raise InputError(f"{told}, and none before it is whole; expected a whole checkpoint (or --resume never)")
    return None


def _faults_seen_by_all(folder: Path) -> list[str]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, folder_faults(folder, part=dist.get_rank(), parts=len(everyone)))
    return [fault for of_rank in everyone for fault in of_rank]


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


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be made or written to; nothing is made.

    Raises:
        InputError: naming what stands in the way.
    """
    there, fault = folder.absolute(), ""
    while True:
        try:
            os.stat(there)
            break
        except FileNotFoundError:
            there = there.parent
        except OSError as error:
            fault = str(error.strerror)
            break
    if not fault and not there.is_dir():
        fault = f"{there} is a file"
    elif not fault and not os.access(there, os.W_OK | os.X_OK):
        fault = f"{there} is not writable"
    for name in ("config.yaml", "metrics.jsonl"):
        if not fault and (folder / name).is_dir():
            fault = f"{folder / name}, which a run writes, is a folder"
    if fault:
        raise _unusable(folder, fault)


def make_folder(folder: Path) -> None:
    """Make the output folder.

    Raises:
        InputError: the file system does not take it.
        OSError: there is no space.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise
        raise _unusable(folder, str(error.strerror)) from error


def _unusable(folder: Path, fault: str) -> InputError:
    return InputError(
        f"output_dir={one_line(folder)}: {fault}; expected a folder that can be made and written to "
        "(another --output_dir)"
    )


def check_resume_folder(cfg: RunConfig) -> bool:
    """Whether ``--resume`` names a folder, which then must be the run's own.

    Raises:
        InputError: it is another.
    """
    named = cfg.resume not in ("auto", "never")
    if named and Path(cfg.resume).resolve() != Path(cfg.output_dir).resolve():
        raise InputError(
            f"resume={cfg.resume}: expected auto, never or the run's own --output_dir {cfg.output_dir} (a copy of that "
            f"folder is resumed by naming it in --output_dir)"
        )
    return named
