"""Show rows as the model will read them: how they were recognised, what of each is learned, and how long they are.

Segments are coloured on a terminal (prompt blue, rationale yellow, answer green) and named where output goes elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import typing
from typing import Any

from kvds.config.settings import DataSettings
from kvds.errors import InputError

_MODELS = {
    "tokenizer_name": "folder or hub name of the tokenizer", "model_name": "likewise, of a model that brings one",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; those of training's data mean the same."""
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="a recipe or a run's config.yaml; flags override it"
    )
    parser.add_argument("--show", type=int, default=3, metavar="N", help="rows of each corpus (default: %(default)s)")
    parser.add_argument(
        "--split", choices=("train", "eval"), default="train", help="rows to learn from, or held-out ones (train)"
    )
    for name, text in _MODELS.items():
        parser.add_argument(f"--{name}", metavar="NAME", default=argparse.SUPPRESS, help=text)
    hints = typing.get_type_hints(DataSettings)
    for field in dataclasses.fields(DataSettings):
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata["help"].replace("%", "%%")}
        if typing.get_origin(hints[field.name]) is tuple:
            options |= {"nargs": "+", "metavar": "NAME"}
        elif hints[field.name] is bool:
            options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
        else:
            options["metavar"] = "|".join(field.metadata["choices"]) or field.name.upper()
        parser.add_argument(f"--{field.name}", **options)


def run(arguments: argparse.Namespace) -> int:
    """Read, encode, print."""
    given = {name: value for name, value in vars(arguments).items() if name not in ("recipe", "show", "split")}
    flags = [] if arguments.recipe is None else ["--config", arguments.recipe]
    for name, value in given.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    flags += ["--output_dir", "unused"]
    if arguments.recipe is None:
        named = given.get("tokenizer_name") or given.get("model_name")
        if named is None:
            raise InputError(
                "--tokenizer_name is missing; expected a folder or a hub name (or a RECIPE that names one)"
            )
        flags += ["--student_name", named, "--alignment_mode", "none"]
    if arguments.show < 0:
        raise InputError(f"--show {arguments.show}: expected at least 0 rows")
    from kvds.config.recipe import parse_run_config

    cfg = parse_run_config(flags)
    from kvds.data.mixture import check_rows
    from kvds.data.row_display import segment_table, whole_row
    from kvds.data.run_data import encoded_rows
    from kvds.data.token_files import TokenFiles
    from kvds.models.tokenizer import load_tokenizer

    check_rows(cfg, cfg.seed)
    tokenizer = load_tokenizer(cfg)
    rows = encoded_rows(cfg, tokenizer, TokenFiles())
    held_out = arguments.split == "eval"
    examples, samples = (rows.held_out_examples, rows.held_out) if held_out else (rows.examples, rows.samples)
    if not samples:
        raise InputError(f"eval_subset_size={cfg.eval_subset_size}: no row is held out; expected at least 1")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    shown: dict[str, int] = {}
    for sample in samples:
        corpus = examples[sample.example].corpus
        shown[corpus] = shown.get(corpus, 0) + 1
        if shown[corpus] <= arguments.show:
            print(whole_row(sample, examples, tokenizer, colour=colour), end="\n\n")
    print(segment_table(samples, examples))
    print(f"{len(examples) - len(samples)} rows longer than --max_length {cfg.max_length} left out")
    return 0
