"""A run's configuration, from a recipe file and flags."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvds.config.flag_parser import given_flags
from kvds.config.run_config import RunConfig
from kvds.config.setting_rules import check, hints, kind_rules
from kvds.config.shipped_files import MODELS, RECIPES, find_shipped
from kvds.config.values import number
from kvds.config.yaml_file import load_mapping
from kvds.errors import InputError, near_miss, one_line


def load_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe file's settings, keys checked; a bare name is one that kvds brings along.

    Raises:
        InputError: no such file, not YAML, not a mapping, or a key that is no setting.
    """
    path = find_shipped(path, RECIPES)
    return with_shipped_models(checked_settings(load_mapping(path), path))


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
        elif isinstance(value, str) and typing.get_origin(hints()[key]) is tuple:
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


def named_output_dir(argv: Sequence[str]) -> Path | None:
    """The output folder that flags or their recipe name, whatever else is wrong with them; None where it cannot be
    told.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output_dir", "--output-dir")
    parser.add_argument("--config")
    try:
        given, _ = parser.parse_known_args(list(argv))
        folder = given.output_dir
        if folder is None and given.config is not None:
            folder = load_mapping(find_shipped(given.config, RECIPES)).get("output_dir")
    except (argparse.ArgumentError, InputError):
        return None
    return Path(folder) if isinstance(folder, str) and folder and "\0" not in folder else None


def parse_run_config(argv: Sequence[str]) -> RunConfig:
    """Recipe and flags, flags winning, as one checked configuration.

    Raises:
        InputError: an unknown flag or key, a value of the wrong kind or out of range.
    """
    values = given_flags(argv)
    recipe = values.pop("config", None)
    settings = {**(load_recipe(recipe) if recipe is not None else {}), **with_shipped_models(values)}
    if "output_dir" not in settings:
        raise InputError("--output_dir is missing; expected a folder to write the run to (--output_dir outputs/NAME)")
    cfg = RunConfig(**settings)
    cfg.check_before_start(settings)
    return cfg


def with_shipped_models(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings``, in which a model that kvds brings along is the folder where it lies, from wherever a run starts."""
    models = {field.name for field in dataclasses.fields(RunConfig) if field.metadata["form"] == "model"}
    given = {name: value for name, value in settings.items() if name in models and isinstance(value, str) and value}
    found = {name: find_shipped(value, MODELS) for name, value in given.items()}
    return {**settings, **{name: str(path) for name, path in found.items() if path != Path(given[name])}}
