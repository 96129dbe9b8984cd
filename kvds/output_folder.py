"""Whether an output folder can be made, written to and resumed, asked before anything is written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from kvds.config import RunConfig
from kvds.config_values import one_line
from kvds.errors import InputError

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
