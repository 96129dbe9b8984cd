"""Start of a process, which with its number tells it from all others: numbers are given anew once one has ended."""

from __future__ import annotations


def start_ticks(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None where it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
