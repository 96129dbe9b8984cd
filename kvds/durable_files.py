"""Files that are whole or not there: written aside, flushed to the disk, put in place by one rename; and the one form
in which kvds writes JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished"


def json_text(value: Any, **options: Any) -> str:
    """``value`` as JSON, which knows neither NaN nor infinity: null stands in their place, at any depth.

    Args:
        value: Of dictionaries, lists, tuples, texts, numbers, booleans and None.
        options: Of :func:`json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_file(path: Path) -> None:
    """Return when the contents of ``path`` (a file, or a folder's list of names) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replace ``path`` by a file that holds ``text``. A crash at any moment leaves the old file or the new one.

    Raises:
        OSError: no space, no permission; the old file is untouched.
    """
    aside = path.with_name(path.name + UNFINISHED)
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    sync_file(path.parent)


def put_in_place(new: Path, target: Path) -> None:
    """Give the finished file or folder ``new`` the name ``target``; what bore that name before is removed after."""
    old = None
    if target.is_dir():  # a folder that holds something cannot be replaced in one step
        old = target.with_name(target.name + ".replaced")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.replace(new, target)
    sync_file(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove ``folder``; a crash meanwhile leaves nothing that bears its name."""
    gone = folder.with_name(folder.name + ".deleted")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what crashes in the functions above have left in ``folder``."""
    for suffix in (UNFINISHED, ".replaced", ".deleted"):
        for left in folder.glob(f"*{suffix}"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def existing_parent(path: Path) -> Path:
    """``path`` or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
