"""Turn a checkpoint of a run into a plain student, which transformers loads, and its map_aligner.pt."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvds.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--run", type=Path, metavar="DIR", required=True, help="output folder of the run")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint after N optimizer steps; unset: the latest")
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="for student/ and map_aligner.pt")


def run(arguments: argparse.Namespace) -> int:
    """Export and say where to."""
    from kvds.checkpoint.export import export_checkpoint
    from kvds.commands.output_folder import check_output, owned_output

    check_output(arguments.output)
    if not arguments.run.is_dir():
        raise InputError(f"--run {arguments.run}: no such folder; expected the --output_dir of a run")
    with owned_output(arguments.output):
        folder = export_checkpoint(arguments.run, arguments.step, arguments.output)
    print("written:", *sorted(str(path) for path in folder.iterdir() if not path.name.startswith(".")))
    return 0
