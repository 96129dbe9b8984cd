"""An experiment in MLflow: one parent run, and nested in it a run per arm and seed with its settings and curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvds.experiment.plan import ExperimentPlan
from kvds.experiment.results import Row
from kvds.tracking.tracker import default_tracking_uri

_PARENT = "mlflow.parentRunId"


def track_experiment(plan: ExperimentPlan, rows: Sequence[Row], folder: Path, tracking_uri: str | None = None) -> str:
    """Write the finished runs of an experiment; each call writes a new parent.

    Args:
        plan: Its name, primary metric and baseline are the parent's parameters.
        rows: Finished runs.
        folder: The experiment's: its files become artifacts of the parent.
        tracking_uri: None: ``mlflow.db`` in ``folder``.

    Returns:
        MLflow's id of the parent run.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri or default_tracking_uri(folder))
    experiment = client.get_experiment_by_name("kvds-ab")
    try:
        artifacts = (folder.resolve() / "mlflow_artifacts").as_uri() if tracking_uri is None else None
        number = experiment.experiment_id if experiment else client.create_experiment("kvds-ab", artifacts)
    except MlflowException:  # another process made it meanwhile
        number = client.get_experiment_by_name("kvds-ab").experiment_id
    parent = client.create_run(number, run_name=plan.name).info.run_id
    about: dict[str, Any] = {"plan": plan.name, "primary": plan.primary, "baseline": plan.baseline, "runs": len(rows)}
    client.log_batch(parent, params=[Param(key, str(item)) for key, item in about.items()])
    for row in rows:
        name = f"{row['arm']}-seed{row['seed']}"
        child = client.create_run(number, run_name=name, tags={_PARENT: parent}).info.run_id
        params = {"arm": row["arm"], **row.get("settings", {})}
        numbers = [
            Metric(key, float(item), 0, 0)
            for key, item in row.items()
            if isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)
        ]
        points = [
            Metric(f"curve/{key}", float(item), 0, int(step))
            for key, (steps, values) in row.get("curves", {}).items()
            for step, item in zip(steps, values, strict=True)
            if item is not None and math.isfinite(item)
        ]
        client.log_batch(child, params=[Param(key, str(item)[:500]) for key, item in params.items()])
        for begin in range(0, len(numbers) + len(points), 1000):  # the most that one call takes
            client.log_batch(child, metrics=[*numbers, *points][begin : begin + 1000])
        tags = [RunTag(key, str(row[key])) for key in ("config_hash", "git_revision") if key in row]
        client.log_batch(child, tags=tags)
        client.set_terminated(child)
    for path in sorted(folder.glob("*.*")):
        if path.suffix in (".md", ".csv", ".png", ".yaml"):
            client.log_artifact(parent, str(path))
    client.set_terminated(parent)
    return parent
