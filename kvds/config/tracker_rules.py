"""Rules of the trackers that a run reports to: which go together, and whether this machine can reach them."""

from __future__ import annotations

import os
from collections.abc import Iterator

from kvds.config.all_settings import AllSettings
from kvds.config.extras import need
from kvds.config.setting_rules import Rule


def tracker_rules(cfg: AllSettings) -> Iterator[Rule]:
    """Trackers that go together, and a store that MLflow writes to."""
    alone = len(cfg.report_to) == 1 or "none" not in cfg.report_to
    yield alone, "report_to", " ".join(cfg.report_to), "none by itself, or trackers without it"
    uri = cfg.tracking_uri
    folder = uri is not None and uri != "databricks" and ("://" not in uri or uri.startswith("file:"))
    expected = "sqlite:///FILE.db or http(s)://SERVER, as MLflow writes to no folder (unset: OUTPUT_DIR/mlflow.db)"
    yield not folder, "tracking_uri", uri, expected


def reachable_tracker_rules(cfg: AllSettings) -> Iterator[Rule]:
    """The packages of the trackers, and wandb's key.

    Raises:
        InputError: a package is missing.
    """
    for tracker in cfg.report_to:
        if tracker not in ("mlflow", "none"):  # the default does without: metrics.jsonl has it all
            need(f"report_to={tracker}", tracker)
    if "wandb" in cfg.report_to and writes_records():
        fault = _wandb_login_fault()
        expected = "a key (wandb login, or WANDB_API_KEY=…), or WANDB_MODE=offline and later wandb sync"
        yield not fault, "report_to", f"wandb{fault}", expected


def writes_records() -> bool:
    """Whether this process is the rank that writes to trackers and the hub; others need no keys, and may lack them."""
    return os.environ.get("RANK", "0") == "0"


def _wandb_login_fault() -> str:
    """What is wrong with wandb's key, to stand behind its name; empty where it has one or needs none."""
    import wandb

    if wandb.setup().settings.mode not in ("online", "shared"):
        return ""
    try:
        return "" if wandb.login(verify=False, prompt=False) else " without a key"
    except wandb.errors.AuthenticationError as error:
        return f" with a key that is none: {error}"
