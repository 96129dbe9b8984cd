"""Rules of the student that a run leaves: what says which is best, and whether it can go where it shall."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from kvds.config.all_settings import AllSettings
from kvds.config.setting_rules import Rule
from kvds.config.tracker_rules import writes_records

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_TRUE = {"1", "ON", "YES", "TRUE"}


def outcome_rules(cfg: AllSettings) -> Iterator[Rule]:
    """Evaluations on the way where one of them is to be the best, and a metric that they have."""
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(cfg, name):
            needed = f"above 0 with --{name}, which compares evaluations"
            yield cfg.eval_steps > 0, "eval_steps", cfg.eval_steps, needed
            yield cfg.eval_subset_size > 0, "eval_subset_size", cfg.eval_subset_size, needed
    if cfg.metric_for_best_model == "kv_loss":
        expected = "cross_entropy or exact_match where no evaluation has a KV loss: without alignment, and with a cache"
        yield cfg.uses_kv and cfg.teacher_cache is None, "metric_for_best_model", "kv_loss", expected
    if cfg.hub_model_id is not None:
        whole = _REPOSITORY.fullmatch(cfg.hub_model_id) is not None
        yield whole, "hub_model_id", cfg.hub_model_id, "NAME or OWNER/NAME (leave it away: the output folder's name)"


def upload_rules(cfg: AllSettings) -> Iterator[Rule]:
    """Whether this machine may upload, seen without asking the hub."""
    if cfg.push_to_hub and writes_records():
        from huggingface_hub import get_token

        offline = any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
        expected = "a way to the hub, but HF_HUB_OFFLINE is set (unset it, or --no_push_to_hub and later hf upload)"
        yield not offline, "push_to_hub", True, expected
        expected = "a token that may write (hf auth login, or HF_TOKEN=…; or --no_push_to_hub and later hf upload)"
        yield get_token() is not None, "push_to_hub", True, expected
        repository = repository_of(cfg)
        expected = "--hub_model_id NAME, as the output folder's name is none of a repository"
        yield _REPOSITORY.fullmatch(repository) is not None, "push_to_hub", True, expected


def repository_of(cfg: AllSettings) -> str:
    """Where the student is uploaded to."""
    return cfg.hub_model_id or Path(cfg.output_dir).resolve().name
