"""What a benchmark's numbers need beside them: versions, machine, revision, command; and rows as CSV and Markdown."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kvds.tracking.provenance import git_revision, typed_command

RESULTS = Path(__file__).resolve().parent / "results"


def device_name() -> str:
    """The GPU's name, or the processor's with the threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name} ({torch.get_num_threads()} threads)"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def revision() -> str:
    """Of the checkout; ``KVDS_REVISION`` says it for a copy of one."""
    return os.environ.get("KVDS_REVISION") or git_revision() or "unknown"


def provenance(packages: Sequence[str] = ("torch", "triton")) -> dict[str, str]:
    """Columns that say where and by what a row was measured."""
    return {
        "device": device_name(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "git_revision": revision(),
        "command": typed_command(),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows, columns in the order in which they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """A table of the given columns; numbers with three significant digits."""

    def text(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(text(row.get(name, "")) for name in columns) + " |" for row in rows]
    return "\n".join(lines)
