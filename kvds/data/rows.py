"""Parsed rows of a file, each with its line, or with what is wrong there.

JSON lines and JSON lists; CRLF, a byte-order mark and blank lines are fine. What a row means is
:mod:`kvds.data.corpora`'s business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kvds.errors import InputError

_BLANK = re.compile(r"[ \t\r\n]*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class BadRow(ValueError):
    """A row that is not what its corpus promises; the text says which field and why."""


def file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line (1-based) and parsed row of each row of ``path``; a :class:`BadRow` in place of a line that is no JSON.

    Args:
        path: ``.json`` holds one list, every other name one row a line.

    Raises:
        InputError: unreadable file, or a list broken in a way that hides where its next row begins.
    """
    try:
        with path.open("rb") as file:
            if path.suffix == ".json":
                yield from _list_rows(path, file.read().removeprefix(_BYTE_ORDER_MARK))
            else:
                yield from _line_rows(file)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: {reason}; expected a data file there (see --data_dir)") from error


class _Decoder(json.JSONDecoder):
    """JSON in which a field given twice is a fault; JSON itself takes the last of the two."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._fields)
        self._twice: str | None = None

    def _fields(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            self._twice = next(name for name in names if names.count(name) > 1)
        return fields

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """The value that begins at ``idx``, or a :class:`BadRow`, and where it ends."""
        self._twice = None
        value, end = super().raw_decode(s, idx)
        return (
            value if self._twice is None else BadRow(f"{self._twice!r:.60} stands there twice; expected it once")
        ), end


def _line_rows(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Rows of lines, of which one at a time is held: a file may be larger than memory."""
    decoder = _Decoder()
    file.seek(len(_BYTE_ORDER_MARK) if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0)
    lines = (line for part in file for line in part.splitlines())  # a carriage return alone ends one, too
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, decoder.decode(line.decode())
            except UnicodeDecodeError as error:
                yield number, BadRow(f"not UTF-8 text ({error.reason} at byte {error.start})")
            except (ValueError, RecursionError) as error:
                yield number, BadRow(f"not JSON ({error})")


def _list_rows(path: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    """Rows of one JSON list, read one after the other: a parser of the whole list would forget the lines."""
    decoder = _Decoder()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text ({error.reason}); expected a JSON list of rows") from error

    def skip_blank(begin: int) -> int:
        match = _BLANK.match(text, begin)
        return match.end() if match else begin

    position = skip_blank(0)
    if text[position : position + 1] != "[":
        raise InputError(f"{path}:1: no JSON list; expected [row, row, …] (name a file of JSON lines .jsonl)")
    position, line, counted = skip_blank(position + 1), 1, 0
    empty = text[position : position + 1] == "]"
    while not empty:
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); expected a list of rows") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{line}: not JSON ({error}); expected a list of rows") from error
        yield line, row
        position = skip_blank(position)
        separator = text[position : position + 1]
        if separator == "]":
            break
        if separator != ",":
            here = text.count("\n", 0, position) + 1
            raise InputError(f"{path}:{here}: not JSON (a comma or ] is missing); expected a list of rows")
        position = skip_blank(position + 1)
    if text[skip_blank(position + 1) :]:
        here = text.count("\n", 0, position) + 1
        raise InputError(f"{path}:{here}: more text follows the list; expected one JSON list of rows")
