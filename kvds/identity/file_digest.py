"""Digest of all bytes of a file, remembered, so that a second look costs no reading.

Two files have the same digest where their bytes are equal, and only there (SHA-256 over the SHA-256 of each 16 MiB,
which threads share out). A digest is remembered under the file's path and holds as long as inode, size, time of the
last write and time of the last change are those of the moment it was read. The last is set by the system alone: bytes
that were changed and dressed up with the old size and the old time of writing are read again. What is not seen: a
change that leaves no trace in a file system's own record, such as a write to the raw device, or a clock set back to the
very nanosecond. A file that was touched within the last seconds may still be written within the same tick of the clock,
and is not remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from kvds.durable_files import json_text
from kvds.errors import InputError

log = logging.getLogger("kvds")

_CHUNK = 2**24
# Below, reading costs no more than looking it up.
_SMALL = 2**20
_AT_REST_SECONDS = 2.0
_PATIENCE_SECONDS = 5.0
_THREADS = 8

Stamp = tuple[int, int, int, int]


def cache_folder() -> Path:
    """``kvds`` below the folder in which ``datasets`` keeps its own files."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets") / "kvds"


def file_digests(paths: Iterable[Path]) -> list[str]:
    """The digest of each of ``paths``, 64 hexadecimal digits; what is not remembered is read by threads.

    Raises:
        InputError: a file cannot be read.
    """
    files = [Path(path) for path in paths]
    try:
        stamps = [_stamp(path) for path in files]
        found = [None if stamp[1] < _SMALL else _recall(path, stamp) for path, stamp in zip(files, stamps, strict=True)]
        unread = [number for number, digest in enumerate(found) if digest is None]
        for number, digest in zip(unread, _read([files[number] for number in unread]), strict=True):
            found[number] = digest
            if stamps[number][1] >= _SMALL:
                _remember(files[number], stamps[number], digest)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}; expected a file that can be read") from error
    return [str(digest) for digest in found]


def file_digest(path: Path) -> str:
    """The digest of one file; see :func:`file_digests`."""
    return file_digests([path])[0]


def _stamp(path: Path) -> Stamp:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _record(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]
    return cache_folder() / "digests" / f"{name}.json"


def _recall(path: Path, stamp: Stamp) -> str | None:
    try:
        record = json.loads(_record(path).read_text(encoding="utf-8"))
        known = tuple(record["stamp"]) == stamp and len(record["digest"]) == 64
        return str(record["digest"]) if known else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(path: Path, stamp: Stamp, digest: str) -> None:
    """Keep the digest, unless the file changed meanwhile or may still; a folder that takes nothing costs time alone."""
    with contextlib.suppress(OSError):
        if _stamp(path) != stamp or time.time() - max(stamp[2:]) / 1e9 < _AT_REST_SECONDS:
            return
        record = _record(path)
        record.parent.mkdir(parents=True, exist_ok=True)
        aside = record.with_name(f"{record.name}.{uuid.uuid4().hex}")
        aside.write_text(json_text({"path": str(path), "stamp": stamp, "digest": digest}), encoding="utf-8")
        os.replace(aside, record)


def _read(files: list[Path]) -> list[str]:
    sizes = [os.stat(path).st_size for path in files]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        chunks = [
            [threads.submit(_chunk, path, begin) for begin in range(0, max(size, 1), _CHUNK)]
            for path, size in zip(files, sizes, strict=True)
        ]
        _tell_if_slow([chunk for of_file in chunks for chunk in of_file], files, sum(sizes))
        # An empty last chunk would stand for a file cut short meanwhile: the size goes in, too.
        return [
            hashlib.sha256(b"".join([size.to_bytes(8, "little"), *(chunk.result() for chunk in of_file)])).hexdigest()
            for size, of_file in zip(sizes, chunks, strict=True)
        ]


def _chunk(path: Path, begin: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return hashlib.sha256(file.read(_CHUNK)).digest()


def _tell_if_slow(chunks: list[Future[bytes]], files: list[Path], size: int) -> None:
    if wait(chunks, _PATIENCE_SECONDS).not_done:
        log.info(
            "reading all bytes of %s (%.1f GB) to know it again; once, then its digest is remembered",
            ", ".join(sorted({str(path.parent) for path in files})), size / 1e9,
        )  # fmt: skip
