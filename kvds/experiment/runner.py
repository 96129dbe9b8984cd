"""Runner of experiments: jobs dealt out to worker processes, each result kept the moment it is there.

A job counts as done when its line is in ``runs.jsonl``: an interrupted experiment goes on where it stopped, and a job
that was interrupted is done anew from its start.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvds.errors import InputError
from kvds.experiment.inputs import inputs_of
from kvds.experiment.launcher import chosen_gpus, run_log
from kvds.experiment.plan import PREPARED, ExperimentPlan, Job, load_tuned, references, save_tuned
from kvds.experiment.results import FAILED, FINISHED, INPUTS, ResultStore, Row, identity, key_of, value
from kvds.experiment.workers import WORKER_MODULE, Worker, device_groups, worker_environment
from kvds.identity.folder_owner import FolderOwner
from kvds.tracking.provenance import git_revision

log = logging.getLogger("kvds")

KEEP = ("metrics", "student", "all")
TUNED_FILE = "tuned.yaml"
# Workers of an experiment that was killed end by themselves within seconds.
_ORPHAN_SECONDS = 30.0


@dataclass
class Experiment:
    """A plan and the folder of its results.

    Attributes:
        plan: What is to be run.
        folder: Holds ``runs.jsonl``, ``tuned.yaml``, ``prepared/`` and the report.
        tuned: A file of chosen values to use instead of its own.
        to_read: Nothing is to be run.
    """

    plan: ExperimentPlan
    folder: Path
    tuned: Path | None = None
    to_read: bool = False
    store: ResultStore = field(init=False)

    def __post_init__(self) -> None:
        self.store = ResultStore(self.folder, self.inputs, to_read=self.to_read)

    def inputs(self, job: Job) -> dict[str, str]:
        """What a run of ``job`` would read now, by content, and what the prepared runs that it builds on would."""
        found = inputs_of(job.settings, self.prepared)
        needed, todo = set(), references(job.settings)
        while todo:
            name = todo.pop()
            if name not in needed:
                needed.add(name)
                settings = {**self.plan.common, **self.plan.prepare[name]}
                found = {**inputs_of(settings, self.prepared), **found}
                todo += references(settings)
        return found

    def prepared(self, name: str) -> Path:
        """Where the student of a prepared run is."""
        return self.folder / "prepared" / name

    def report_jobs(self) -> list[Job]:
        """The reported runs, with the values that tuning chose.

        Raises:
            InputError: values are to be chosen and none are there yet.
        """
        source = self.folder.parent / self.plan.tuned_from if self.plan.tuned_from else self.folder
        file = self.tuned or source / TUNED_FILE
        needed = any(arm.tune or arm.tuned_as for arm in self.plan.arms.values())
        return self.plan.report_jobs(load_tuned(file) if needed and (self.tuned or file.is_file()) else {})

    def save_choice(self, jobs: Sequence[Job], *, in_time: bool = True) -> None:
        """Write ``tuned.yaml`` from the tuning ``jobs`` that have ended; choices of arms not among them stay.

        Args:
            jobs: Those that were to be run.
            in_time: Whether all of them were tried; otherwise nothing is written where no seed is complete.

        Raises:
            InputError: all were tried, and no seed is complete.
        """
        if not in_time and not complete_seeds(self.plan, self.store, jobs):
            return
        chosen, seeds = choose(self.plan, self.store, jobs)
        values = max(len(arm.tune) for arm in self.plan.arms.values())
        file = self.folder / TUNED_FILE
        chosen = (load_tuned(file) if file.is_file() else {}) | chosen
        note = f"Chosen by {self.plan.primary}, mean over {seeds} tuning seed(s), {values} values per arm."
        save_tuned(file, chosen, note)


Work = tuple[Experiment, Job]


class Runner:
    """Trains jobs in worker processes that live until it is left; what they are at then is left undone.

    Args:
        logs: Folder of the workers' logs.
        workers: Processes at a time.
        devices: See :func:`kvds.experiment.workers.device_groups`.
        ranks: Ranks of one run, started by the ``deepspeed`` launcher.
        in_process: Train inside the workers instead, which saves the launcher's start; ``ranks`` is 1.
        keep: What stays of a finished run's folder: ``metrics`` (nothing but its row), ``student``, or ``all``.
        deadline: ``time.monotonic()`` at which workers are stopped; None: never.
        module: What workers run.

    Raises:
        InputError: ``devices``, or the environment, that do not fit ``ranks``.
    """

    def __init__(
        self, logs: Path, *, workers: int = 1, devices: Sequence[str] = (), ranks: int = 1, in_process: bool = False,
        keep: str = "metrics", deadline: float | None = None, module: str = WORKER_MODULE,
    ) -> None:  # fmt: skip
        self._logs, self._count, self._keep, self._deadline, self._module = logs, workers, keep, deadline, module
        self._how = {"ranks": ranks, "in_process": in_process}
        self._groups = device_groups(devices, ranks, in_process=in_process)
        if not devices and not in_process:
            chosen_gpus(os.environ, ranks)
        self._workers: dict[int, Worker] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopping = False
        self._revision = git_revision() or "unknown"

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stopping = True
            workers = list(self._workers.values())
        for worker in workers:
            worker.stop()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def run(self, work: Sequence[Work], title: str) -> bool:
        """Train what has no finished result yet, in order; a failure is recorded and does not stop the rest.

        Returns:
            Whether all of it was tried (False: the deadline came first).
        """
        waiting = [(experiment, job) for experiment, job in work if not experiment.store.finished([job])]
        for experiment in {id(experiment): experiment for experiment, _ in waiting}.values():
            if told := experiment.store.left_out([job for e, job in waiting if e is experiment]):
                log.warning("%s and made anew", told)
        todo: queue.SimpleQueue[Work] = queue.SimpleQueue()
        for item in waiting:
            todo.put(item)
        bar = tqdm(total=len(work), initial=len(work) - len(waiting), desc=title, unit="run", mininterval=0)
        ended: list[Job] = []
        self._threads = [
            threading.Thread(target=self._serve, args=(number, todo, bar, ended), daemon=True)
            for number in range(min(self._count, len(waiting)))
        ]
        with bar:
            for thread in self._threads:
                thread.start()
            for thread in self._threads:
                thread.join()
        return len(ended) == len(waiting)

    def _serve(self, number: int, todo: queue.SimpleQueue[Work], bar: tqdm, ended: list[Job]) -> None:
        """Feed one worker until nothing is left or the time is up; a process whose run has not finished is replaced."""
        while self._deadline is None or time.monotonic() < self._deadline:
            try:
                experiment, job = todo.get_nowait()
            except queue.Empty:
                return
            with self._lock:
                if self._stopping:
                    return
                if number not in self._workers:
                    environment = worker_environment(number, self._groups)
                    log_path = self._logs / f"worker-{number}.log"
                    self._workers[number] = Worker(log_path, environment, self._module)
                worker = self._workers[number]
            row = self._train(worker, experiment, job)
            if row is None or row["status"] == FAILED:
                with self._lock:
                    if self._stopping:  # killed, whatever its status says
                        return
                    del self._workers[number]
                worker.stop()  # what is left of a run must not reach the next
            if row is None:
                continue
            with self._lock:
                experiment.store.append(row)
                ended.append(job)
                bar.set_postfix_str(f"{job.name} {row['status']}", refresh=False)
                bar.update()
            if row["status"] == FAILED:
                log.warning("%s failed: %s", job.name, row["error"])

    def _train(self, worker: Worker, experiment: Experiment, job: Job) -> Row | None:
        folder = experiment.folder / "runs" / job.name
        inputs = experiment.inputs(job)
        try:
            _clear(folder)
        except InputError as error:
            return identity(job) | {"status": FAILED, "error": str(error), INPUTS: inputs}
        settings = {
            **{key: _resolved(item, experiment) for key, item in job.settings.items()},
            "output_dir": str(folder), "resume": "never", "report_to": ["none"], "save_steps": 0,
            "save_at_end": self._keep == "all",  # any other is deleted with the folder
        }  # fmt: skip
        begun = time.perf_counter()
        answer = worker.ask({"settings": settings, **self._how}, self._deadline)
        if answer is None:
            return None
        if answer["status"] == FINISHED and experiment.inputs(job) != inputs:
            answer = {"status": FAILED, "error": "data or models that it reads were changed while it ran"}
        row = identity(job) | {"wall_seconds": time.perf_counter() - begun} | answer | {INPUTS: inputs}
        if row["status"] == FINISHED:
            if job.phase == "prepare":
                target = experiment.prepared(job.arm)
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(folder / "student", target)
            if self._keep != "all":
                run_log(folder).unlink(missing_ok=True)
            if self._keep == "metrics":
                shutil.rmtree(folder)
            elif self._keep == "student":
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return row | {"git_revision": self._revision, "settings": job.settings}


def _clear(folder: Path) -> None:
    """Remove what a run that was interrupted has left, once the last of its processes is gone."""
    if folder.exists():
        with FolderOwner(folder).take(patience=_ORPHAN_SECONDS):
            shutil.rmtree(folder)


def _resolved(item: Any, experiment: Experiment) -> Any:
    named = isinstance(item, str) and item.startswith(PREPARED)
    return str(experiment.prepared(item.removeprefix(PREPARED))) if named else item


def prepare(experiments: Sequence[Experiment], runner: Runner) -> bool:
    """Train what arms build on; one experiment after the other, since a prepared run may build on an earlier one.

    Returns:
        Whether all is there (False: out of time).

    Raises:
        InputError: a prepared run failed, or its student was removed.
    """
    for experiment in experiments:
        store = experiment.store
        for job in experiment.plan.preparation_jobs():
            folder = experiment.prepared(job.arm)
            if store.finished([job]) and not (folder / "config.json").is_file():
                raise InputError(
                    f"{folder}: its run is recorded in {store.path} and its student is gone; expected both (delete the "
                    "line to train it again)"
                )
            if not runner.run([(experiment, job)], f"prepare {job.arm}"):
                return False
            if store.failed([job]):
                raise InputError(f"prepared run {job.arm} failed: {store.failed([job])[0]['error']}")
    return True


def complete_seeds(plan: ExperimentPlan, store: ResultStore, jobs: Sequence[Job]) -> list[int]:
    """The tuning seeds for which all of ``jobs`` have ended, and there are any."""
    ended = store.finished(jobs).keys() | {key_of(row) for row in store.failed(jobs)}
    wanted = {seed: [job for job in jobs if job.seed == seed] for seed in plan.tuning_seeds}
    return [seed for seed, own in wanted.items() if own and all(job.key in ended for job in own)]


def choose(plan: ExperimentPlan, store: ResultStore, jobs: Sequence[Job]) -> tuple[dict[str, dict[str, Any]], int]:
    """Each arm's best value by the primary metric, mean over the seeds for which all of the tuning ``jobs`` have ended.

    A failed run, or one whose metric is not finite, counts as the worst.

    Returns:
        Arm → chosen settings, and the number of complete seeds.

    Raises:
        InputError: no seed is complete.
    """
    rows, seeds = store.finished(jobs), complete_seeds(plan, store, jobs)
    if not seeds:
        raise InputError(f"{store.path}: no tuning seed is complete; expected one at least (--tune goes on)")
    sign = 1.0 if plan.higher_is_better else -1.0
    scores: dict[str, dict[int, list[float]]] = {}
    for job in jobs:
        if job.seed in seeds:
            score = sign * value(rows.get(job.key, {}), plan.primary)
            score = score if math.isfinite(score) else -sys.float_info.max
            scores.setdefault(job.arm, {}).setdefault(job.variant, []).append(score)
    # fsum of the worst possible twice would overflow: the mean is taken of shares.
    means = {
        arm: {variant: sum(score / len(found) for score in found) for variant, found in variants.items()}
        for arm, variants in scores.items()
    }
    return {arm: plan.arms[arm].tune[max(m, key=m.__getitem__)] for arm, m in means.items()}, len(seeds)


def needs_preparation(experiment: Experiment, jobs: Sequence[Job]) -> bool:
    """Whether any of ``jobs`` builds on a prepared run."""
    return any(references(job.settings) for job in jobs)
