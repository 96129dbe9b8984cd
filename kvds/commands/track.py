"""Hand the records of a run to MLflow that it was not given while it trained; what MLflow has is not sent twice."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from kvds.config.recipe import load_recipe
from kvds.errors import InputError, RunError
from kvds.tracking.metrics_file import METRICS_FILE, read_metrics
from kvds.tracking.mlflow_writer import RUN_ID_FILE, MlflowWriter
from kvds.tracking.tracker import default_tracking_uri

log = logging.getLogger("kvds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``kvds track``."""
    parser.add_argument("run", metavar="OUTPUT_DIR", help="folder of a run, with metrics.jsonl and config.yaml")
    parser.add_argument("--tracking_uri", help="MLflow's store (default: the run's own setting)")
    parser.add_argument("--seconds", type=float, default=600.0, help="longest wait for MLflow (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Send what is missing, end the MLflow run and return 0.

    Raises:
        InputError: no such run.
        RunError: MLflow could not be reached, or not in time.
    """
    folder = Path(arguments.run)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected the --output_dir of a run")
    records = read_metrics(folder / METRICS_FILE)
    settings = load_recipe(folder / "config.yaml")
    uri = arguments.tracking_uri or settings.get("tracking_uri") or default_tracking_uri(folder)
    known = folder / RUN_ID_FILE
    faults: list[str] = []
    writer = MlflowWriter(
        folder, tracking_uri=uri, experiment_name=settings.get("experiment_name", "kvds"),
        run_name=settings.get("run_name") or folder.resolve().name, params=settings, tags={"uploaded": "kvds track"},
        run_id=known.read_text(encoding="utf-8").strip() or None if known.is_file() else None, resume_step=None,
        system_metrics=False, warn=lambda error: faults.append(" ".join(str(error).split())[:200]), backlog=records,
    )  # fmt: skip
    in_time = writer.finish("FINISHED" if (folder / "student").is_dir() else "KILLED", arguments.seconds)
    if faults or not in_time:
        reason = faults[0] if faults else f"no answer within {arguments.seconds:g} s"
        raise RunError(f"{uri}: {reason}; nothing is lost, call kvds track again when MLflow can be reached")
    log.info("%d records of %s are in MLflow, run %s", len(records), folder, writer.run_id)
    return 0
