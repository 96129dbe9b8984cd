"""Flags that say how rows of one's own are read, for commands that read rows without a run; meanings are training's."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from kvds.config.setting_rules import check, kind_rules
from kvds.config.settings import DataSettings
from kvds.errors import InputError

if TYPE_CHECKING:
    from kvds.data.own_rows import Reading

_FIELDS = {field.name: field for field in dataclasses.fields(DataSettings)}
_NAMES = ("columns", "data_format", "chat_template", "assistant_turns")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Declare them, with training's defaults."""
    for name in _NAMES:
        field = _FIELDS[name]
        choices = field.metadata["choices"]
        options: dict[str, Any] = {"metavar": "|".join(choices) if choices else name.upper(), "default": field.default}
        if name == "columns":
            options |= {"nargs": "+", "metavar": "NAME=COLUMN,…"}
        parser.add_argument(f"--{name}", help=field.metadata["help"], **options)


def check_data_flags(arguments: argparse.Namespace) -> None:
    """Refuse what training would refuse.

    Raises:
        InputError: as a run.
    """
    from kvds.config.values import parse_columns

    arguments.columns = tuple(arguments.columns)
    for name in _NAMES:
        check(kind_rules(_FIELDS[name], getattr(arguments, name)))
    for text in arguments.columns:
        parse_columns(text)
    if len(arguments.columns) not in (0, 1, len(arguments.datasets)):
        raise InputError(
            f"columns={' '.join(arguments.columns)}: expected one for all data sets, or one for each of the "
            f"{len(arguments.datasets)} of --datasets (auto: by their names)"
        )


def reading_of(arguments: argparse.Namespace) -> Reading:
    """How rows are read."""
    from kvds.data.own_rows import Reading

    return Reading(arguments.data_format, arguments.columns)


def with_template(tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """The tokenizer, with the template that was named."""
    from kvds.models.tokenizer import read_chat_template

    if arguments.chat_template is not None:
        tokenizer.chat_template = read_chat_template(arguments.chat_template)
    return tokenizer
