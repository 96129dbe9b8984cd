"""Files that are whole or not there: written aside, flushed to the disk, put in place by one rename; and the one form
in which kvds writes JSON.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def full_disk(error: BaseException) -> str:
    """What is said of an error that tells of a full disk, quota or file; empty for any other.

    Libraries in other languages tell of it in errors of their own, with the system's number in the text.
    """
    name = error.filename if isinstance(error, OSError) else None
    known = error.errno if isinstance(error, OSError) else None
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = known if known is not None or told is None else int(told[1])
    return f"{name or 'the output'}: {os.strerror(number)}" if number is not None and number in _FULL else ""


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


def _umask() -> int:
    """Of this process. Asking the system sets it for a moment, for all threads: where Linux shows it, it is read."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def set_modes(path: Path) -> None:
    """Give a file, or a folder with all in it, the modes that plainly opened files have under this process's umask.

    What is written through temporary files, as safetensors are, could be read by its owner alone.
    """
    umask = _umask()
    for entry in (path, *path.rglob("*")):
        if not entry.is_symlink():
            found = entry.stat().st_mode
            entry.chmod(found & 0o7000 | (0o777 if entry.is_dir() else 0o666) & ~umask)


def put_in_place(new: Path, target: Path) -> None:
    """Give the finished file or folder ``new`` the name ``target``, with modes by the umask; what bore that name before
    is removed after.
    """
    set_modes(new)
    old = None
    if target.is_dir():  # a folder that holds something cannot be replaced in one step
        old = target.with_name(target.name + ".replaced")
        _remove(old)
        os.rename(target, old)
    os.replace(new, target)
    sync_file(target.parent)
    if old is not None:
        _remove(old)


def _remove(path: Path) -> None:
    """Remove a file, a folder as far as that goes, or a link alone: what it leads to is its owner's."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove ``folder``; a crash meanwhile leaves nothing that bears its name."""
    gone = folder.with_name(folder.name + ".deleted")
    _remove(gone)
    os.rename(folder, gone)
    _remove(gone)


def remove_leftovers(folder: Path) -> None:
    """Remove what crashes in the functions above have left in ``folder``."""
    for suffix in (UNFINISHED, ".replaced", ".deleted"):
        for left in folder.glob(f"*{suffix}"):
            _remove(left)


def existing_parent(path: Path) -> Path:
    """``path`` or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
