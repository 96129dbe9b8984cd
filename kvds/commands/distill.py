"""Distil a student through a teacher's keys and values; one process, or one rank of those that a launcher starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def run_flags(flags: Sequence[str]) -> int:
    """Run, or with ``--dry_run`` only check.

    Args:
        flags: Settings, as ``--help all`` lists them.

    Returns:
        The exit code of :func:`kvds.training.rank.run_rank`.
    """
    if not flags:
        from kvds.config.flag_parser import flag_parser

        flag_parser(short=True).print_help(sys.stderr)
        return 2
    from kvds.training.rank import run_rank

    return run_rank(flags)
