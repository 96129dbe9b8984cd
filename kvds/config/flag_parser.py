"""The flags of a run: one for each setting, in either spelling, with a help that is short unless all is asked for."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from kvds.config.run_config import SECTIONS, RunConfig
from kvds.config.setting_rules import hints
from kvds.config.values import number
from kvds.errors import InputError, near_miss, one_line

_DESCRIPTION = (
    "Distil a student through a teacher's keys and values. Alone it is one process; several start as `deepspeed "
    "--module kvds distill …`, `torchrun -m kvds distill …`, `accelerate launch -m kvds distill …` or `srun kvds "
    "distill …`."
)

_HELP = "--help all lists all flags"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{one_line(message)} ({_HELP})")


class _Help(argparse.Action):
    """Prints the flags that most runs need, or all."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        flag_parser(short=values != "all").print_help()
        raise SystemExit(0)


def flag_parser(short: bool = False) -> argparse.ArgumentParser:
    """The parser of all flags.

    Args:
        short: Its help shows only those that most runs need.
    """
    count = len(dataclasses.fields(RunConfig))
    parser = _Parser(
        prog="kvds distill", allow_abbrev=False, argument_default=argparse.SUPPRESS, description=_DESCRIPTION,
        usage="kvds distill [--config RECIPE] [--flag value …]", add_help=False,
        epilog=f"--help all lists all {count} flags." if short else None,
    )  # fmt: skip
    add_flags(parser, short)
    return parser


def add_flags(parser: argparse.ArgumentParser, short: bool = False) -> None:
    """Declare all flags; with ``short``, those that most runs do not need are told by no help."""
    parser.add_argument(
        "-h", "--help", action=_Help, nargs="?", metavar="all", help="show the flags that most runs need, or all"
    )
    parser.add_argument(
        "--config", metavar="RECIPE",
        help="recipe that sets any flag, by path or by the name of one that kvds brings; flags override it",
    )  # fmt: skip
    # What launchers pass on: the rank is read from the environment instead.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    kinds = hints()
    for section in SECTIONS:
        group = parser.add_argument_group(str(section.__doc__).strip().rstrip("."))
        for field in dataclasses.fields(section):
            hint, choices = kinds[field.name], field.metadata["choices"]
            default = "" if field.default is dataclasses.MISSING else f" (default: {field.default})"
            text = (field.metadata["help"] + default).replace("%", "%%")
            shown = field.metadata["common"] or not short
            options: dict[str, Any] = {"help": text if shown else argparse.SUPPRESS}
            if hint is bool:
                options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
                group.add_argument(
                    f"--no_{field.name}", dest=field.name, action="store_const", const="false", help=argparse.SUPPRESS
                )
            elif typing.get_origin(hint) is tuple:
                entry = "|".join(choices) or ("NUMBER" if typing.get_args(hint)[0] is float else "NAME")
                options |= {"nargs": "+", "metavar": entry}
            else:
                options["metavar"] = "|".join(choices) if choices else field.name.upper()
            group.add_argument(f"--{field.name}", **options)


def as_declared(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """``argv`` with flags spelled as ``parser`` declares them: ``--alignment-mode`` is ``--alignment_mode``."""
    known = declared_flags(parser)
    by_letters = {_letters(flag): flag for flag in known}
    spelled: list[str] = []
    for position, token in enumerate(argv):
        if token == "--":  # what follows is not for this parser
            return spelled + list(argv[position:])
        name, equals, value = token.partition("=")
        declared = name if name in known else by_letters.get(_letters(name), name)
        spelled.append(f"{declared}{equals}{value}" if name.startswith("--") else token)
    return spelled


def declared_flags(parser: argparse.ArgumentParser) -> set[str]:
    """All ``--flag`` of a parser, those of its subcommands among them."""
    flags = {flag for flag in parser._option_string_actions if flag.startswith("--")}
    for action in parser._actions:
        for below in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            flags |= declared_flags(below)
    return flags


def _letters(flag: str) -> str:
    return flag.replace("-", "_")


def given_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Settings that flags name, as values, and the recipe under ``config``.

    Raises:
        InputError: an unknown flag, or a value of the wrong kind.
    """
    parser = flag_parser()
    given, unknown = parser.parse_known_args(as_declared(argv, parser))
    if unknown:
        raise unknown_flag(unknown, [f"--{field.name}" for field in dataclasses.fields(RunConfig)])
    values = vars(given)
    values.pop("local_rank", None)
    values.pop("deepspeed", None)
    return {name: text if name == "config" else _from_text(name, text) for name, text in values.items()}


def unknown_flag(unknown: Sequence[str], known: Iterable[str], help_flag: str = _HELP) -> InputError:
    """What is said of the first flag that no parser knows."""
    flag = next((token for token in unknown if token.startswith("-")), unknown[0])
    if not flag.startswith("-"):
        return InputError(f"unexpected argument {one_line(flag)} (expected --flag value; {help_flag})")
    name = flag.split("=")[0]
    dashes = len(name) - len(name.lstrip("-"))
    near = near_miss(name[:dashes] + _letters(name[dashes:]), sorted(known))
    return InputError(f"unknown flag {one_line(flag)}{near} (expected --flag value; {help_flag})")


def _from_text(name: str, text: Any) -> Any:
    hint = hints()[name]
    if typing.get_origin(hint) is tuple:
        return tuple(map(number, text)) if typing.get_args(hint)[0] is float else tuple(text)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"--{name} {one_line(text)}: expected true or false (--{name} or --no_{name})")
        return text.lower() == "true"
    if text.lower() == "none" and types.NoneType in typing.get_args(hint):
        return None
    if hint in (str, str | None):
        return text
    return number(text)
