"""An experiment in MLflow: a run per arm with the means of its seeds, which are nested in it, and one with the report.

MLflow folds away what is nested and draws the first ten runs: opened, it shows the arms side by side.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvds.experiment.plan import ExperimentPlan
from kvds.experiment.results import Row
from kvds.tracking.mlflow_database import EXPERIMENT_TAGS
from kvds.tracking.tracker import default_tracking_uri

_PARENT, _DESCRIPTION, _EXPERIMENT = "mlflow.parentRunId", "mlflow.note.content", "experiment_run"


def track_experiment(plan: ExperimentPlan, rows: Sequence[Row], folder: Path, tracking_uri: str | None = None) -> str:
    """Write the finished runs of an experiment; each call writes all anew.

    Args:
        plan: Its name, primary metric and baseline are parameters of the run with the report.
        rows: Finished runs.
        folder: The experiment's: its files become artifacts of that run.
        tracking_uri: None: ``mlflow.db`` in ``folder``.

    Returns:
        MLflow's id of the run with the report, which all others name in the tag ``experiment_run``.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri or default_tracking_uri(folder))
    experiment = client.get_experiment_by_name("kvds-ab")
    try:
        artifacts = (folder.resolve() / "mlflow_artifacts").as_uri() if tracking_uri is None else None
        number = (
            experiment.experiment_id if experiment else client.create_experiment("kvds-ab", artifacts, EXPERIMENT_TAGS)
        )
    except MlflowException:  # another process made it meanwhile
        number = client.get_experiment_by_name("kvds-ab").experiment_id
    arms = list(dict.fromkeys(str(row["arm"]) for row in rows))
    told = f"{len(arms)} arms ({', '.join(arms)}), judged by {plan.primary} against {plan.baseline}; see report.md"
    parent = client.create_run(number, run_name=plan.name, tags={_DESCRIPTION: told}).info.run_id
    shown = telling_numbers(rows)
    # A curve that stands still in all runs, such as an exact match of 0, would be a picture of nothing.
    moving = {key for row in rows for key, curve in mean_curves([row]).items() if len(set(curve.values())) > 1}
    about: dict[str, Any] = {"plan": plan.name, "primary": plan.primary, "baseline": plan.baseline, "runs": len(rows)}
    client.log_batch(parent, params=[Param(key, str(item)) for key, item in about.items()])

    def write(name: str, about: str, params: dict[str, Any], shared: Sequence[Row], outer: str | None = None) -> str:
        """A run with the means of ``shared``."""
        tags = {_EXPERIMENT: parent, _DESCRIPTION: about} | ({} if outer is None else {_PARENT: outer})
        made: str = client.create_run(number, run_name=name, tags=tags).info.run_id
        numbers = [Metric(key, value, 0, 0) for key, value in means(shared, shown).items()]
        points = [
            Metric(f"curve/{key}", value, 0, step)
            for key, curve in mean_curves(shared).items()
            if key in moving
            for step, value in curve.items()
        ]
        client.log_batch(made, params=[Param(key, str(item)[:500]) for key, item in params.items()])
        for begin in range(0, len(numbers) + len(points), 1000):  # the most that one call takes
            client.log_batch(made, metrics=[*numbers, *points][begin : begin + 1000])
        client.set_terminated(made)
        return made

    for arm in reversed(arms):  # MLflow puts the newest first
        seeds = [row for row in rows if str(row["arm"]) == arm]
        outer = write(arm, f"means of {len(seeds)} seeds of arm {arm} of {plan.name}", {"arm": arm}, seeds)
        for row in seeds:
            settings = {"arm": row["arm"], **row.get("settings", {})}
            child = write(
                f"{arm}-seed{row['seed']}", f"arm {arm}, seed {row['seed']} of {plan.name}", settings, [row], outer
            )
            facts = [RunTag(key, str(row[key])) for key in ("config_hash", "git_revision") if key in row]
            client.log_batch(child, tags=facts)
    for path in sorted(folder.glob("*.*")):
        if path.suffix in (".md", ".csv", ".png", ".yaml"):
            client.log_artifact(parent, str(path))
    client.set_terminated(parent)
    return parent


def means(rows: Sequence[Row], names: Sequence[str]) -> dict[str, float]:
    """The mean of each number over the rows that have it."""
    values = {name: [float(row[name]) for row in rows if _is_number(row.get(name))] for name in names}
    return {name: statistics.fmean(found) for name, found in values.items() if found}


def mean_curves(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Each curve's mean over the rows, at the steps where all of them have a finite value; one point is no curve."""
    found: dict[str, dict[int, float]] = {}
    for key in dict.fromkeys(key for row in rows for key in row.get("curves", {})):
        curves = [dict(zip(*row["curves"][key], strict=True)) for row in rows if key in row.get("curves", {})]
        steps = sorted(step for step in curves[0] if all(_is_number(curve.get(step)) for curve in curves))
        if len(steps) > 1:
            found[key] = {int(step): statistics.fmean(curve[step] for curve in curves) for step in steps}
    return found


def telling_numbers(rows: Sequence[Row]) -> list[str]:
    """The numbers that tell runs apart: not the same in all of them, nor in each what another one is already.

    Args:
        rows: Of runs; of one alone all its numbers tell something.
    """
    names = dict.fromkeys(key for row in rows for key, item in row.items() if _is_number(item) and key != "seed")
    found: dict[tuple[Any, ...], str] = {}
    for name in names:
        values = tuple(row.get(name) for row in rows)
        if len(rows) == 1 or len(set(values)) > 1:
            found.setdefault(values if len(rows) > 1 else (name,), name)
    return list(found.values())


def _is_number(item: Any) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)
