"""Flags that say which rows are read and how, for commands that read rows without a run; meanings are training's."""

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


def add_data_flags(
    parser: argparse.ArgumentParser, numbers: dict[str, tuple[int, str]], *, of: str = "model's"
) -> None:
    """Declare them, with training's defaults.

    Args:
        parser: Of the command.
        numbers: What else is counted: flag → default, meaning.
        of: Whose positions bound a row.
    """
    data = DataSettings()
    parser.add_argument(
        "--datasets", nargs="+", metavar="NAME", default=list(data.datasets),
        help="as training's: gsm8k …, OWNER/NAME of the hub, a file or folder of your own (default: synthetic)",
    )  # fmt: skip
    parser.add_argument("--data_dir", metavar="DIR", help="folder with the publishers' files; unset: hub names")
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--max_length", type=int, metavar="N",
        help=f"tokens per row; longer rows are left out (default: {data.max_length}, or the {of} positions)",
    )  # fmt: skip
    parser.add_argument(
        "--max_lossy_rows", type=float, default=data.max_lossy_rows, metavar="SHARE",
        help="share of rows that may lose characters which the tokenizer does not know (default: %(default)s)",
    )  # fmt: skip
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

    if not 0 <= arguments.max_lossy_rows <= 1:
        raise InputError(f"--max_lossy_rows {arguments.max_lossy_rows}: expected a share from 0 to 1")
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
