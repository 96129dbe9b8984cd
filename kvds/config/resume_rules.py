"""Rules of a resumed run: its settings and those that its checkpoint was trained under."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from kvds.config.recipe import load_recipe
from kvds.config.run_config import RunConfig
from kvds.errors import InputError


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
        if not free and name in before and before[name] != value:
            raise InputError(
                f"--{name} {value}: the checkpoint in {cfg.output_dir} was trained with {before[name]}; expected "
                f"the same value to go on (or --resume never, or another --output_dir)"
            )
