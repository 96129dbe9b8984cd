"""Compare runs: a table on the terminal and in report.md, and loss_curves.png."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", type=Path, help="output folders of runs")
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="for report.md and loss_curves.png")


def run(arguments: argparse.Namespace) -> int:
    """Write the report and print its table."""
    from kvds.tracking.run_report import format_table, read_runs, write_report

    table = format_table(read_runs(arguments.runs))
    written = write_report(arguments.runs, arguments.output)
    print(table)
    print("written:", *written)
    return 0
