"""Students of an experiment, judged several at a time. What is judged is kept, and the same call goes on."""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.records import provenance, write_csv

Row = dict[str, Any]


class Student(NamedTuple):
    """A run that has left its student."""

    arm: str
    seed: int
    folder: Path


def students_in(experiment: Path) -> list[Student]:
    """Those of an experiment that keeps them, the first seeds of all arms before the second ones of any."""
    found = []
    for path in experiment.glob("**/report-*/student/config.json"):
        arm, _, seed = path.parent.parent.name.removeprefix("report-").rpartition("-seed")
        found.append(Student(arm, int(seed), path.parent))
    return sorted(found, key=lambda student: (student.seed, student.arm))


def model_device() -> torch.device:
    """Where this process runs models: of several GPUs each process takes one."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        return torch.device("cpu")
    return torch.device("cuda", os.getpid() % torch.cuda.device_count())


def judged_rows(
    students: Sequence[Student],
    judge: Callable[[Path], list[Row]],
    output: Path,
    *,
    workers: int = 1,
    minutes: float | None = None,
) -> list[Row]:
    """Rows of all students that are judged, the earlier ones of ``output`` among them.

    Args:
        students: In the order in which they are judged.
        judge: From a student's folder to its rows; sent to other processes where ``workers`` is above 1.
        output: CSV, written again after each student.
        workers: Students at a time.
        minutes: Begin none after them; what has begun is finished. None: judge all.
    """
    rows: list[Row] = []
    if output.is_file():
        with output.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["arm"], int(row["seed"])) for row in rows}
    left = [student for student in students if (student.arm, student.seed) not in done]
    facts = provenance(("torch", "transformers"))
    for student, found in _in_turn(left, judge, workers, None if minutes is None else time.monotonic() + 60 * minutes):
        rows += [{"arm": student.arm, "seed": student.seed, **row, **facts} for row in found]
        write_csv(output, rows)
        print(f"{student.arm}, seed {student.seed}: judged", flush=True)
    return [{**row, "seed": int(row["seed"])} for row in rows]


def _in_turn(
    students: Sequence[Student], judge: Callable[[Path], list[Row]], workers: int, end: float | None
) -> Iterator[tuple[Student, list[Row]]]:
    """Each student with its rows, as soon as they are there."""
    waiting = list(students)

    def next_student() -> Student | None:
        return waiting.pop(0) if waiting and (end is None or time.monotonic() < end) else None

    if workers == 1:
        while (student := next_student()) is not None:
            yield student, judge(student.folder)
        return
    with _pool(workers) as pool:
        running: dict[Future[list[Row]], Student] = {}
        while True:
            while len(running) < workers and (student := next_student()) is not None:
                running[pool.submit(judge, student.folder)] = student
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _pool(workers: int) -> Executor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))  # a fork has no CUDA


def common_seeds(rows: Sequence[Row]) -> list[int]:
    """Those of which every arm has a student: only these are compared."""
    arms: dict[str, set[int]] = {}
    for row in rows:
        arms.setdefault(row["arm"], set()).add(int(row["seed"]))
    return sorted(set.intersection(*arms.values())) if arms else []


def number(value: Any) -> float:
    """A cell of a CSV; NaN where it is empty."""
    return float("nan") if value in ("", None) else float(value)


def add_judging_flags(parser: argparse.ArgumentParser) -> None:
    """Declare which students are judged, and how long."""
    parser.add_argument("experiment", type=Path, help="folder of an experiment whose runs keep their students")
    parser.add_argument("--workers", type=int, default=1, help="students judged at a time (1)")
    parser.add_argument("--minutes", type=float, help="begin no further student after them")


def judge_experiment(
    arguments: argparse.Namespace, judge: Callable[..., Any], tell: Callable[[Sequence[Row]], str]
) -> list[dict[str, Any]]:
    """Judge what is new, write CSV and tables.

    Args:
        arguments: Of :func:`add_judging_flags`, and ``output``, the CSV; tables go beside it.
        judge: As of :func:`judged_rows`.
        tell: From all rows to the tables.
    """
    rows = judged_rows(
        students_in(arguments.experiment), judge, arguments.output, workers=arguments.workers, minutes=arguments.minutes
    )
    if not rows:
        sys.exit(f"{arguments.experiment}: no student is judged; expected one that --keep student left, or more time")
    text = tell(rows)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)
    return rows
