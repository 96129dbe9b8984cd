"""Which settings may change when a run is resumed."""

from __future__ import annotations

import os
from pathlib import Path

from kvds.config.recipe import load_recipe
from kvds.config.run_config import RunConfig, hints
from kvds.errors import InputError

# A resumed run must be the same run: these may change between attempts.
_FREE_ON_RESUME = {
    "output_dir", "resume", "logging_steps", "save_steps", "eval_steps", "eval_subset_size", "max_new_tokens", 
    "report_to", "tracking_uri", "experiment_name", "run_name", "data_dir", "deepspeed_config", "teacher_placement",
    "teacher_tp_size", "teacher_overlap", "pad_to_multiple_of",
    "model_name", "teacher_name", "student_name", "tokenizer_name", "impl",
    "teacher_cache", "data_cache",
    "dry_run",
    # Their product with the number of ranks may not: the checkpoint knows it.
    "batch_size", "gradient_accumulation_steps", "change_global_batch",
    "keep_checkpoints", "max_minutes", "max_bad_steps", "rank_timeout",
}  # fmt: skip


def check_resumable(cfg: RunConfig, saved: str | Path) -> None:
    """Compare with the configuration that a checkpoint was trained under.

    Raises:
        InputError: a setting differs that would make it another run.
    """
    if not os.path.isfile(saved):
        raise InputError(f"{saved}: missing beside the checkpoints; expected the run's config.yaml (or --resume never)")
    before = load_recipe(saved)
    for name in hints():
        value = getattr(cfg, name)
        # Where the weight is held, it moves at logging steps.
        free = name in _FREE_ON_RESUME and not (name == "logging_steps" and cfg.kv_weight_held)
        if not free and name in before and before[name] != value:
            raise InputError(
                f"--{name} {value}: the checkpoint in {cfg.output_dir} was trained with {before[name]}; expected "
                f"the same value to go on (or --resume never, or another --output_dir)"
            )
