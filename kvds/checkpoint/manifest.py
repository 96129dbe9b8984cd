"""Manifest of a checkpoint: names, sizes and SHA-256 of its files, so that damage is known before it is read.

The checksums are of the bytes that were handed to the operating system, not of the bytes that came to lie on the disk:
reading a file back compares the two. They tell damage, not malice: who can write the files can write the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kvds.durable_files import json_text, write_durably

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its size in bytes and the SHA-256 of its contents in hexadecimal digits."""

    bytes: int
    sha256: str


class ChecksummedFile:
    """A writable file that counts and hashes what it is given; ``error`` holds the first failure.

    ``write`` never raises: torch's writer would be torn down in the middle of its archive. After a failure the rest is
    swallowed, and the caller asks :attr:`error`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes or a buffer and return its size."""
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        self._digest.update(data)
        self._bytes += size
        return size

    def flush(self) -> None:
        """Do nothing: :meth:`finish` flushes once."""

    def finish(self) -> FileEntry:
        """Flush to the disk and return size and checksum of all that was given.

        Raises:
            OSError: this or an earlier write failed.
        """
        if self.error is not None:
            raise self.error
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileEntry(self._bytes, self._digest.hexdigest())


def file_fault(path: Path, entry: FileEntry) -> str | None:
    """What is wrong with ``path``, in words that follow its name, or None where it is as ``entry`` says."""
    try:
        if not path.is_file() or path.is_symlink():
            return "is missing" if not path.exists() else "is not a plain file"
        size = path.stat().st_size
        if size != entry.bytes:
            return f"has {size} bytes instead of {entry.bytes}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest == entry.sha256 else "does not have the checksum that was written"


def write_manifest(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Write ``manifest.json`` of ``files`` (name relative to ``folder`` → entry).

    Raises:
        OSError: it could not be written.
    """
    content = {"version": 1, "files": {name: vars(entry) for name, entry in sorted(files.items())}}
    write_durably(folder / MANIFEST_FILE, json_text(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """The files of a checkpoint.

    Raises:
        ValueError: saying what is wrong with the manifest, in words that follow its name.
    """
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = {str(name): FileEntry(int(e["bytes"]), str(e["sha256"])) for name, e in content["files"].items()}
    except FileNotFoundError:
        raise ValueError("is missing") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("is damaged") from error
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts or name in ("", ".", MANIFEST_FILE):
            raise ValueError(f"names {name[:80]!r}, which is no file of this checkpoint")
    if not files:
        raise ValueError("names no file")
    return files


def folder_faults(folder: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the checkpoint in ``folder``; empty where it is whole.

    Args:
        folder: A checkpoint with its manifest.
        part: Which share of the files to read, so that ranks can split the work.
        parts: Number of shares.
    """
    try:
        files = read_manifest(folder)
    except ValueError as error:
        return [f"{MANIFEST_FILE} {error}"]
    mine = sorted(files)[part::parts]
    faults = [f"{name} {fault}" for name in mine if (fault := file_fault(folder / name, files[name])) is not None]
    # What DeepSpeed finds by a pattern of names must not be a file that nobody wrote.
    return faults + [f"{name} is not in {MANIFEST_FILE}" for name in _strangers(folder, files)] if part == 0 else faults


def _strangers(folder: Path, known: Iterable[str]) -> list[str]:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return sorted(found - set(known) - {MANIFEST_FILE})
