"""Output folder of a command: no file, and written to by one job at a time."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from kvds.errors import InputError, one_line
from kvds.identity.folder_owner import FolderOwner, living_owner, refusal


def check_output(folder: Path) -> None:
    """Refuse what cannot be an output, before anything is read.

    Raises:
        InputError: a file, or another job's.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: is a file; expected a folder")
    if folder.is_dir() and (owner := living_owner(folder)) is not None:
        raise refusal(folder, owner, "output")


@contextlib.contextmanager
def owned_output(folder: Path) -> Iterator[None]:
    """Within it the folder is there and this command's; one that was made and nothing written to is gone afterwards.

    Raises:
        InputError: it cannot be made, or another job owns it.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: {one_line(error)}; expected a folder that can be made") from error
    try:
        with FolderOwner(folder, flag="output"):
            yield
    finally:
        if made and all(path.name.startswith(".owner") for path in folder.iterdir()):
            shutil.rmtree(folder)
