"""Print a shell's script for tab completion of kvds: commands, flags, choices, recipes, files.

kvds completion bash > ~/.local/share/bash-completion/completions/kvds
kvds completion zsh > DIRECTORY_OF_FPATH/_kvds
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from pathlib import Path

from kvds.cli import COMMANDS, NEEDS
from kvds.config import SECTIONS
from kvds.config.extras import installed
from kvds.config.flag_parser import add_flags
from kvds.config.shipped_files import DEEPSPEED_CONFIGS, RECIPES, shipped_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="whose script")


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    print(shtab.complete(whole_parser(), arguments.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """All commands that can run here, as one parser; of settings with choices, the flags know them."""
    parser = argparse.ArgumentParser(prog="kvds", description="kvds COMMAND [--flag value …]")
    commands = parser.add_subparsers()
    for name, (module_name, text) in COMMANDS.items():
        if not all(map(installed, NEEDS.get(name, ()))):
            continue
        command = commands.add_parser(name, help=text, add_help=name != "distill")
        if name == "distill":
            add_flags(command)
        else:
            importlib.import_module(f"kvds.commands.{module_name}").add_arguments(command)
        for action in command._actions:
            _complete(action)
    return parser


def _complete(action: argparse.Action) -> None:
    """Tell the library what one flag's values are."""
    import shtab

    choices = {field.name: field.metadata["choices"] for section in SECTIONS for field in dataclasses.fields(section)}
    brought = {"config": RECIPES, "recipe": RECIPES, "deepspeed_config": DEEPSPEED_CONFIGS}
    if action.dest in brought:
        action.choices = shipped_names(brought[action.dest])
    elif choices.get(action.dest) and not action.const:
        action.choices = list(choices[action.dest])
    elif action.type is Path or action.dest in ("output_dir", "data_dir"):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
