"""Rules of a resumed run: its settings and those that its checkpoint was trained under."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from kvds.config.recipe import load_recipe
from kvds.config.run_config import RunConfig
from kvds.config.values import split_dataset_weight
from kvds.errors import InputError

_EARLIER_MAP_START = "random"


def check_resumable(cfg: RunConfig, saved: str | Path) -> None:
    """Compare with the configuration that a checkpoint was trained under.

    Raises:
        InputError: a setting differs that would make it another run.
    """
    if not os.path.isfile(saved):
        raise InputError(f"{saved}: missing beside the checkpoints; expected the run's config.yaml (or --resume never)")
    before = load_recipe(saved)
    for field in dataclasses.fields(cfg):
        name, value = field.name, getattr(cfg, field.name)
        # Where the weight is held, it moves at logging steps.
        free = field.metadata["may_change"] and not (name == "logging_steps" and cfg.kv_weight_held)
        same = _by_content(name, before.get(name)) == _by_content(name, value)
        # Earlier versions' default: see as_begun.
        free = free or (name == "map_start" and value == "auto" and before.get(name) == _EARLIER_MAP_START)
        if not free and name in before and not same:
            raise InputError(
                f"--{name} {value}: the checkpoint in {cfg.output_dir} was trained with {before[name]}; expected "
                f"the same value to go on (or --resume never, or another --output_dir)"
            )


def as_begun(cfg: RunConfig, saved: str | Path) -> RunConfig:
    """``cfg`` with maps that started at random, where it leaves that open and the run began by that default."""
    earlier = cfg.map_start == "auto" and load_recipe(saved).get("map_start") == _EARLIER_MAP_START
    return dataclasses.replace(cfg, map_start=_EARLIER_MAP_START) if earlier else cfg


def _by_content(name: str, value: Any) -> Any:
    """``value`` without the places of own files: their rows are compared once they are read, wherever they lie."""
    if name != "datasets" or value is None:
        return value
    named = [split_dataset_weight(spec) for spec in value]
    return [("a file" if corpus.endswith((".jsonl", ".json")) else corpus, weight) for corpus, weight in named]
