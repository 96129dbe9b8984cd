"""A run's configuration, from a recipe file and flags."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from kvds.config.run_config import SECTIONS, RunConfig
from kvds.config.setting_rules import check, hints, kind_rules
from kvds.config.values import number
from kvds.config.yaml_file import load_mapping
from kvds.errors import InputError, near_miss, one_line


def load_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe file's settings, keys checked.

    Raises:
        InputError: no such file, not YAML, not a mapping, or a key that is no setting.
    """
    return checked_settings(load_mapping(path), path)


def checked_settings(content: dict[Any, Any], path: str | Path) -> dict[str, Any]:
    """What a mapping of a YAML file says, as settings: keys known, values of the right kind.

    Raises:
        InputError: a key that is no setting, or a value of the wrong kind; the message names ``path``.
    """
    known = {field.name for field in dataclasses.fields(RunConfig)}
    for key, value in content.items():
        if key not in known:
            raise InputError(
                f"--config {path}: unknown key {one_line(key)}{near_miss(key, sorted(known))} "
                f"(expected one of the flags of --help)"
            )
        if isinstance(value, list):
            content[key] = tuple(value)
        elif key == "datasets" and isinstance(value, str):
            content[key] = (value,)
    for key, value in content.items():
        hint = hints()[key]
        # YAML reads 5e-5 as text: the flag parser's notion of a number holds here, too.
        if isinstance(value, str) and hint in (float, float | None, int | float | None, str | float):
            content[key] = number(value)
    for field in dataclasses.fields(RunConfig):
        if field.name in content:
            check(kind_rules(field, content[field.name]), place=f"{path}: ")
    return content


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{one_line(message)} (--help lists all flags)")


def _parser() -> _Parser:
    parser = _Parser(prog="distill.py", allow_abbrev=False, argument_default=argparse.SUPPRESS, description=__doc__)
    parser.add_argument("--config", help="recipe file that sets any of the flags below; flags override it")
    # What launchers pass on: the rank is read from the environment instead.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    kinds = hints()
    for section in SECTIONS:
        group = parser.add_argument_group(str(section.__doc__).strip().rstrip("."))
        for field in dataclasses.fields(section):
            hint, choices = kinds[field.name], field.metadata["choices"]
            default = "" if field.default is dataclasses.MISSING else f" (default: {field.default})"
            options: dict[str, Any] = {"help": (field.metadata["help"] + default).replace("%", "%%")}
            if hint is bool:
                options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
                group.add_argument(
                    f"--no_{field.name}", dest=field.name, action="store_const", const="false", help=argparse.SUPPRESS
                )
            elif typing.get_origin(hint) is tuple:
                options |= {"nargs": "+", "metavar": "NUMBER" if typing.get_args(hint)[0] is float else "NAME"}
            else:
                options["metavar"] = "|".join(choices) if choices else field.name.upper()
            group.add_argument(f"--{field.name}", **options)
    return parser


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


def parse_run_config(argv: Sequence[str]) -> RunConfig:
    """Recipe and flags, flags winning, as one checked configuration.

    Raises:
        InputError: an unknown flag or key, a value of the wrong kind or out of range.
    """
    parser = _parser()
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        known = sorted(field.name for field in dataclasses.fields(RunConfig))
        flag = next((token for token in unknown if token.startswith("-")), unknown[0])
        name = flag.lstrip("-").split("=")[0]
        kind = "unknown flag" if flag.startswith("-") else "unexpected argument"
        raise InputError(
            f"{kind} {one_line(flag)}{near_miss(name, known)} (expected --flag value; --help lists all flags)"
        )
    values = vars(given)
    values.pop("local_rank", None)
    values.pop("deepspeed", None)
    recipe = values.pop("config", None)
    settings = load_recipe(recipe) if recipe is not None else {}
    settings |= {name: _from_text(name, text) for name, text in values.items()}
    if "output_dir" not in settings:
        raise InputError("--output_dir is missing; expected a folder to write the run to (--output_dir outputs/NAME)")
    cfg = RunConfig(**settings)
    cfg.check_paths()
    return cfg
