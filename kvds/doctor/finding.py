"""Finding: what a check of ``kvds doctor`` found."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ``ok``; ``warning``: a run works but slower or less safely; ``fault``: a run would fail.
        subject: What was looked at, a word or two.
        text: What was found.
        remedy: What to do; empty only where the level is ok.
    """

    level: Level
    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f" → {self.remedy}" if self.remedy else ""
        return f"{self.level:<7}  {self.subject:<12}  {self.text}{remedy}"


def last_line(text: str, default: str) -> str:
    """The last line of a program's output that says something, at most 200 characters."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else default)[:200]


def run_bounded(
    command: Sequence[str], *, seconds: float, environment: Mapping[str, str] | None = None, text: str = ""
) -> tuple[int | None, str]:
    """Exit status (None: it had to be stopped after ``seconds``) and what the program said on both streams."""
    try:
        done = subprocess.run(
            command, input=text, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {seconds:.0f} s"
    except OSError as error:
        return 1, str(error)
    return done.returncode, done.stdout + done.stderr
