"""``metrics.jsonl``: strict JSON, one object per whole line, no value twice, readable while a run writes it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from kvds.durable_files import json_text
from kvds.errors import InputError

METRICS_FILE = "metrics.jsonl"


def _parse(text: str) -> list[dict[str, float | None]]:
    """The whole lines of ``text``; what a killed writer left behind the last line break is dropped.

    Raises:
        ValueError: with the number of the first line that is no record.
    """
    records = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(number)
        records.append(record)
    return records


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The records of a ``metrics.jsonl`` in the order written; null becomes NaN, an unfinished last line is left out.

    Raises:
        InputError: no such file, or a line that is no record.
    """
    try:
        records = _parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the metrics.jsonl that a run writes") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; expected the metrics.jsonl that a run writes") from error
    except ValueError as error:
        raise InputError(f'{path}:{error}: expected an object with a whole "step" (mend or delete the line)') from error
    return [{key: math.nan if value is None else value for key, value in record.items()} for record in records]


class MetricsFile:
    """Appends records, each with one write of a whole line.

    Args:
        path: The file.
        resume_step: None begins a new file (an older one is kept as ``metrics-1.jsonl``, ``metrics-2.jsonl``, …).
            A number goes on with the file: records of later steps are dropped, since the run will write them again.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self._path = path
        # What the kept records say about the step gone on from, so that it is not said twice.
        self._said: set[tuple[int, str]] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size > 0:
            if resume_step is None:
                self._set_aside()
            else:
                self._truncate(resume_step)
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record; it is in the file when the call returns."""
        # Tensors of one number become numbers.
        new = {
            key: value if value is None or isinstance(value, int) else float(value)
            for key, value in metrics.items()
            if (step, key) not in self._said
        }
        if new:
            self._file.write(json_text({"step": step, **new}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; later calls of :meth:`append` raise ValueError."""
        self._file.close()

    def _set_aside(self) -> None:
        number = 1
        while (aside := self._path.with_name(f"{self._path.stem}-{number}{self._path.suffix}")).exists():
            number += 1
        os.replace(self._path, aside)

    def _truncate(self, resume_step: int) -> None:
        try:
            records = _parse(self._path.read_text(encoding="utf-8"))
        except ValueError:  # not ours to repair: keep it beside the new one
            self._set_aside()
            return
        kept = [record for record in records if record["step"] <= resume_step]  # type: ignore[operator]
        self._said = {(resume_step, key) for record in kept if record["step"] == resume_step for key in record}
        unfinished = self._path.with_name(self._path.name + ".unfinished")
        unfinished.write_text("".join(json_text(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(unfinished, self._path)
