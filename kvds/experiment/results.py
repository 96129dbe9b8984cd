"""Results of an experiment: ``runs.jsonl``, one line per run that ended, and the numbers that a run folder yields."""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kvds.durable_files import json_text
from kvds.errors import InputError
from kvds.experiment.plan import Job
from kvds.tracking.run_report import RunRecord

RUNS_FILE = "runs.jsonl"
FINISHED, FAILED = "finished", "failed"
# Logging intervals that a loss curve is smoothed over before its unsteadiness is measured.
_SMOOTHING = 5
IDENTITY = ("phase", "arm", "seed", "variant", "config_hash")
# What a run read, by content.
INPUTS = "inputs"

Row = dict[str, Any]


class ResultStore:
    """The rows of an experiment, in a file that only ever grows by whole lines.

    A process that is killed while it writes leaves part of a line; it is cut off when the file is opened again.

    A row counts for a job where its run had the same settings and read the same contents. What is not on this machine
    is taken to be what the newest row says. A row of an earlier version does not say what its run read, and is never
    counted beside others: alone, where nothing is to be run, it is.

    Args:
        folder: The experiment's, made if missing.
        inputs_of: From a job to what its run would read now (:func:`kvds.experiment.inputs.inputs_of`).
        to_read: Nothing is to be run.

    Raises:
        InputError: a line that no experiment wrote.
    """

    def __init__(
        self, folder: str | Path, inputs_of: Callable[[Job], Row] = lambda job: {}, *, to_read: bool = False
    ) -> None:
        self._inputs_of, self._to_read = inputs_of, to_read
        self.path = Path(folder) / RUNS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            unfinished = self.path.with_name(f"{RUNS_FILE}.unfinished")
            unfinished.write_text(whole, encoding="utf-8")
            os.replace(unfinished, self.path)
        self.rows: list[Row] = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not all(key in row for key in (*IDENTITY, "status")):
                raise InputError(f"{self.path}:{number}: expected a line that kvds ab writes (mend or delete it)")
            self.rows.append(row)

    def append(self, row: Row) -> None:
        """Add one result; it is on the disk when the call returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_text(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)

    def finished(self, jobs: Iterable[Job]) -> dict[tuple[Any, ...], Row]:
        """The latest finished result of each of ``jobs``, by its key; results of other settings or contents do not
        count.
        """
        return {key_of(row): row for row in self._counted(jobs) if row["status"] == FINISHED}

    def failed(self, jobs: Iterable[Job]) -> list[Row]:
        """The latest result of each of ``jobs`` that has failed and has not finished since."""
        jobs = list(jobs)
        done = self.finished(jobs)
        latest = {key_of(row): row for row in self._counted(jobs) if row["status"] == FAILED}
        return [row for key, row in latest.items() if key not in done]

    def left_out(self, jobs: Sequence[Job]) -> str | None:
        """How many finished results of these settings do not count, and why; None where all do."""
        wanted = {job.key for job in jobs}
        of_settings = [row for row in self.rows if key_of(row) in wanted and row["status"] == FINISHED]
        counted = {id(row) for row in self._counted(jobs)}
        others = [row for row in of_settings if id(row) not in counted]
        if not others:
            return None
        return (
            f"{self.path}: {len(others)} of {len(of_settings)} finished runs of these settings read other data or "
            "models than there are now (or do not say which, as an earlier version wrote them); they are not counted"
        )

    def _counted(self, jobs: Iterable[Job]) -> list[Row]:
        now = {job.key: self._inputs_of(job) for job in jobs}
        newest = {name: text for row in self.rows for name, text in row.get(INPUTS, {}).items()}
        old = self._to_read and not any(INPUTS in row for row in self.rows)

        def same(row: Row, inputs: Row) -> bool:
            read = row[INPUTS]
            return all(read.get(name) == inputs.get(name, newest.get(name)) for name in {**read, **inputs})

        rows = [row for row in self.rows if key_of(row) in now]
        return [row for row in rows if (same(row, now[key_of(row)]) if INPUTS in row else old)]


def identity(job: Job) -> Row:
    """The columns that say which run a row is of."""
    return dict(zip(IDENTITY, job.key, strict=True))


def key_of(row: Row) -> tuple[Any, ...]:
    """The key of the job that a row is of."""
    return tuple(row[name] for name in IDENTITY)


def value(row: Row, key: str) -> float:
    """A number of a row; NaN where the run did not record it."""
    number = row.get(key)
    return math.nan if number is None else float(number)


def summarise(run: RunRecord) -> Row:
    """The numbers by which a finished run is compared.

    ``auc/X`` is the mean of X over the evaluations, which lie equally far apart: the area under its curve, divided by
    the length of the run. ``stability`` is the standard deviation of the change between neighbouring points of the
    training loss smoothed over 5 logging intervals: 0 for a straight line.

    Returns:
        Columns of ``runs.csv`` and ``curves``: per metric the steps and its values.
    """
    row: Row = {f"final/{key}": number for key, number in run.held_out.items() if key not in ("samples", "judged")}
    curves = {}
    for name in ("exact_match", "cross_entropy"):
        steps, values = run.series(f"eval/all/{name}")
        if values:
            row[f"auc/{name}"] = statistics.fmean(values)
            curves[name] = [steps, [round(number, 6) for number in values]]
    for key in ("loss/task", "loss/kv", "loss/logit_kd", "kv/norm_ratio", "kv/effective_rank_keys",
                "kv/effective_rank_values", "kv/weight", "kv/gradient_ratio", "grad_norm"):  # fmt: skip
        steps, values = run.series(key)
        if values:
            row[f"last/{key}"] = values[-1]
            if key.startswith("loss/"):
                curves[key] = [steps, [round(number, 6) for number in values]]
    losses = run.series("loss/task")[1]
    row["stability"] = unsteadiness(losses)
    # The first interval holds the warm-up of allocator, kernels and file caches.
    speeds = run.series("perf/tokens_per_second")[1][1:]
    row["perf/tokens_per_second"] = statistics.median(speeds) if speeds else math.nan
    row["perf/peak_memory_bytes"] = max(run.series("perf/peak_memory_bytes")[1], default=math.nan)
    row["curves"] = curves
    return row


def unsteadiness(losses: Sequence[float]) -> float:
    """Standard deviation of the step-to-step change of a smoothed curve; NaN with fewer than three smoothed points."""
    count = len(losses) - _SMOOTHING + 1
    smooth = [statistics.fmean(losses[start : start + _SMOOTHING]) for start in range(count)]
    changes = [after - before for before, after in zip(smooth, smooth[1:], strict=False)]
    return statistics.stdev(changes) if len(changes) >= 2 else math.nan


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line per row, a column per number that any of them has; curves are left out."""
    left_out = ("curves", "settings", "error", INPUTS)
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in left_out))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def write_curves_csv(rows: Sequence[Row], path: Path) -> None:
    """The evaluations of every run: arm, seed, step, exact match and cross entropy."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "seed", "step", "exact_match", "cross_entropy"])
        for row in rows:
            curves = row.get("curves") or {}
            steps, losses = curves.get("cross_entropy", [[], []])
            matches = dict(zip(*curves.get("exact_match", [[], []]), strict=True))
            for step, loss in zip(steps, losses, strict=True):
                match = f"{matches[step]:.4f}" if step in matches else ""  # there are losses without a judged answer
                writer.writerow([row["arm"], row["seed"], step, match, f"{loss:.5f}"])
