"""The folder ``checkpoints/``: which checkpoints it holds, which is the latest, how one comes in and old ones leave."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from kvds.checkpoint.manifest import FileEntry, write_manifest
from kvds.durable_files import UNFINISHED, put_in_place, remove_folder, write_durably
from kvds.errors import InputError, one_line

log = logging.getLogger("kvds")

CHECKPOINTS = "checkpoints"
LATEST_FILE = "latest"
_TAG = re.compile(r"step-([0-9]{6,18})")


def step_tag(step: int) -> str:
    """The name of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:06d}"


def unfinished_tag(step: int) -> str:
    """The name that a checkpoint bears while it is written."""
    return step_tag(step) + UNFINISHED


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of all checkpoints of a run, ascending; whether each is whole is another question."""
    folder = run_dir / CHECKPOINTS
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(match.group(1)) for name in names if (match := _TAG.fullmatch(name)) and (folder / name).is_dir())


def latest_step(run_dir: Path) -> int | None:
    """The step that ``checkpoints/latest`` names, whether its folder is there or not; None where it names none.

    Raises:
        InputError: the file cannot be read, or names something outside of its folder.
    """
    latest = run_dir / CHECKPOINTS / LATEST_FILE
    try:
        tag = latest.read_bytes()[:200].decode("utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{latest}: {error.strerror}; expected a file that names a checkpoint") from error
    match = _TAG.fullmatch(tag)
    if match is not None:
        return int(match.group(1))
    if "/" in tag or "\\" in tag:  # no damage looks like that
        raise InputError(
            f"{latest}: names {one_line(tag)!r}; expected a folder step-NNNNNN beside it (write the name of a "
            "checkpoint there, or --resume never)"
        )
    log.warning("%s: damaged (holds %r); the newest whole checkpoint is taken", latest, one_line(tag))
    return None


def resumable_steps(run_dir: Path) -> list[int]:
    """The checkpoints to try, best first: the one that ``latest`` names and those before it.

    Where ``latest`` is missing (a crash during the very first save) or damaged, from the newest checkpoint on.

    Raises:
        InputError: ``latest`` names something outside of its folder, or nothing is left at or before it.
    """
    steps = saved_steps(run_dir)
    latest = latest_step(run_dir)
    found = [step for step in reversed(steps) if latest is None or step <= latest]
    if latest is not None and not found:
        there = f"; there are {', '.join(map(step_tag, steps))}" if steps else ""
        raise InputError(
            f"{run_dir / CHECKPOINTS / LATEST_FILE}: names {step_tag(latest)!r}, which is not there, and nothing "
            f"before it{there}; expected a folder step-NNNNNN beside it (or --resume never)"
        )
    return found


def commit_checkpoint(run_dir: Path, step: int, files: Mapping[str, FileEntry], *, keep: int) -> None:
    """Make the checkpoint that was written as ``step-NNNNNN.unfinished`` visible; one process.

    Manifest, then the rename, then ``latest``, then the deletion of old ones: a crash between any two leaves ``latest``
    on a whole checkpoint.

    Args:
        run_dir: The run's ``--output_dir``.
        step: Its optimizer step.
        files: Name within the checkpoint → size and checksum.
        keep: How many checkpoints up to this one stay; 0 = all.

    Raises:
        OSError: something could not be written; ``latest`` still names the checkpoint before.
    """
    folder = run_dir / CHECKPOINTS
    write_manifest(folder / unfinished_tag(step), files)
    put_in_place(folder / unfinished_tag(step), folder / step_tag(step))
    write_durably(folder / LATEST_FILE, step_tag(step))
    # Later steps are what a resume from an older checkpoint has left behind: this run will write them anew.
    earlier = [saved for saved in saved_steps(run_dir) if saved <= step]
    for old in earlier[:-keep] if keep else []:
        remove_folder(folder / step_tag(old))
