"""The thread that hands records to MLflow, so that neither a slow database nor a dead server holds up a step."""

from __future__ import annotations

import logging
import posixpath
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kvds.tracking.mlflow_database import EXPERIMENT_TAGS, make_database

RUN_ID_FILE = "mlflow_run_id"
_T = TypeVar("_T")

# MLflow's own limits (mlflow.utils.validation).
_PARAMS_PER_CALL = 100
_METRICS_PER_CALL = 1000
_PARAM_CHARACTERS = 6000
_TAG_CHARACTERS = 8000
_KEY_CHARACTERS = 250
# Metrics kept in memory while a server does not answer.
_PENDING_METRICS = 200_000


class MlflowWriter:
    """A thread that talks to MLflow. What fails is told through ``warn``; metrics of a failed call are sent again.

    Args:
        folder: The run's output folder; gets the file ``mlflow_run_id``.
        tracking_uri: MLflow's store.
        experiment_name: Made if missing.
        run_name: MLflow's name of the run.
        params: Settings. MLflow refuses other values of a setting on resume: those become tags ``resumed/NAME``.
        tags: Facts of this attempt.
        run_id: The run to go on with; None begins one.
        resume_step: Optimizer step that is gone on from; metrics that MLflow has are not sent twice.
        backlog: Records of earlier, as ``metrics.jsonl`` holds them: sent where MLflow lacks them (a run that is killed
            takes with it what it had not handed over yet).
        system_metrics: Record CPU, memory, disk, network and GPU use of this host.
        warn: Called with each exception, in this thread.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tracking_uri: str,
        experiment_name: str,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str | None,
        resume_step: int | None,
        system_metrics: bool,
        warn: Callable[[BaseException], None],
        backlog: Sequence[Mapping[str, float]] = (),
    ) -> None:
        self.run_id: str | None = None
        self._folder, self._uri = folder, tracking_uri
        self._experiment_name, self._run_name = experiment_name, run_name
        self._params, self._tags = dict(params), dict(tags)
        self._resumed_id, self._resume_step = run_id, resume_step
        self._system_metrics = system_metrics
        self._warn = warn
        self._backlog = backlog
        self._queue: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._pending: list[tuple[str, float, int, int]] = []
        self._said: set[tuple[str, int]] = set()
        self._client: Any = None
        self._monitor: Any = None
        # A daemon: a server that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="kvds-mlflow", daemon=True)
        self._thread.start()

    def put_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over metrics after ``step`` optimizer steps; returns at once."""
        self._queue.put(("metrics", step, dict(metrics), time.time_ns() // 1_000_000))

    def put_artifact(self, path: Path) -> None:
        """Hand over a file or folder to copy; returns at once."""
        self._queue.put(("artifact", path))

    def put_tag(self, key: str, value: str) -> None:
        """Hand over a tag; returns at once."""
        self._queue.put(("tag", key, value))

    def flush(self, seconds: float) -> bool:
        """Wait until all that was handed over is dealt with; False if that took longer than ``seconds``."""
        done = threading.Event()
        self._queue.put(("flush", done))
        return done.wait(seconds)

    def finish(self, status: str, seconds: float) -> bool:
        """End the run and the thread; False if that took longer than ``seconds``."""
        self._queue.put(("finish", status))
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        self._attempt(self._open)
        while True:
            # All that waits goes out together: a slow server is asked once for many steps.
            items = [self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get())
            for item in items:
                if item[0] == "metrics":
                    self._attempt(self._collect, *item[1:])
            self._attempt(self._send)
            for item in items:
                if item[0] == "artifact":
                    self._attempt(self._copy, item[1])
                elif item[0] == "tag":
                    self._attempt(self._tag, *item[1:])
                elif item[0] == "flush":
                    item[1].set()
                elif item[0] == "finish":
                    self._attempt(self._close, item[1])
                    return

    def _attempt(self, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:  # databases, networks and file systems fail in their own ways
            self._warn(error)

    def _open(self) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        for name in ("alembic", "mlflow.system_metrics.system_metrics_monitor"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # What it tells of a locked or full database at length is told here in one line.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        make_database(self._uri)
        client = MlflowClient(tracking_uri=self._uri)
        tags = dict(self._tags)
        run = self._find(client)
        if run is None:
            source = {"mlflow.source.name": "launch/distill.py", "mlflow.source.type": "LOCAL"}
            run = client.create_run(self._experiment(client), run_name=self._run_name, tags=source)
        elif self._resume_step is not None:
            tags["resumed_from_step"] = str(self._resume_step)
        run_id = run.info.run_id
        (self._folder / RUN_ID_FILE).write_text(run_id + "\n", encoding="utf-8")
        for key in run.data.metrics:
            if not key.startswith("system/"):
                self._said |= {(key, m.step) for m in client.get_metric_history(run_id, key)}
        self.run_id, self._client = run_id, client
        for record in self._backlog:
            values = {name: value for name, value in record.items() if name != "step"}
            self._collect(int(record["step"]), values, time.time_ns() // 1_000_000)
        self._backlog = ()

        known = run.data.params
        params = {_key(name): _shortened(value, _PARAM_CHARACTERS) for name, value in self._params.items()}
        tags |= {f"resumed/{name}": value for name, value in params.items() if known.get(name, value) != value}
        new = [Param(name, value) for name, value in params.items() if name not in known]
        facts = [RunTag(_key(name), _shortened(value, _TAG_CHARACTERS)) for name, value in tags.items()]
        for chunk in _chunks(new, _PARAMS_PER_CALL):
            client.log_batch(run_id, params=chunk)
        for chunk in _chunks(facts, _PARAMS_PER_CALL):
            client.log_batch(run_id, tags=chunk)
        if self._system_metrics:
            self._start_monitor(run_id)

    def _find(self, client: Any) -> Any:
        """The run to go on with, running again; None where there is none to go on with."""
        from mlflow.exceptions import MlflowException

        if self._resumed_id is None:
            return None
        try:
            run = client.get_run(self._resumed_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._warn(RuntimeError(f"{self._uri} knows no run {self._resumed_id}; its records go on in a new run"))
            return None
        client.update_run(self._resumed_id, status="RUNNING")
        return run

    def _experiment(self, client: Any) -> str:
        found = client.get_experiment_by_name(self._experiment_name)
        if found is not None:
            return found.experiment_id
        # A sqlite store would put artifacts into ./mlruns of wherever the run was started.
        location = None
        if self._uri.startswith("sqlite:///"):
            location = (Path(self._uri.removeprefix("sqlite:///")).resolve().parent / "mlflow_artifacts").as_uri()
        try:
            return client.create_experiment(self._experiment_name, location, EXPERIMENT_TAGS)
        except Exception:  # two runs that begin together: the other was first
            found = client.get_experiment_by_name(self._experiment_name)
            if found is None:
                raise
            return found.experiment_id

    def _start_monitor(self, run_id: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        resumed = self._resumed_id is not None
        self._monitor = SystemMetricsMonitor(run_id, resume_logging=resumed, tracking_uri=self._uri)
        self._monitor.start()

    def _collect(self, step: int, metrics: dict[str, float], timestamp: int) -> None:
        if self._client is None:  # never reached MLflow
            return
        fresh = {key: value for name, value in metrics.items() if ((key := _key(name)), step) not in self._said}
        self._pending += [(key, float(value), timestamp, step) for key, value in fresh.items()]
        del self._pending[:-_PENDING_METRICS]

    def _send(self) -> None:
        from mlflow.entities import Metric

        while self._pending:
            chunk = self._pending[:_METRICS_PER_CALL]
            self._client.log_batch(self.run_id, metrics=[Metric(*entry) for entry in chunk])
            del self._pending[: len(chunk)]

    def _copy(self, path: Path) -> None:
        if self._client is None:
            return
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), artifact_path=path.name)
        else:
            self._client.log_artifact(self.run_id, str(path))

    def _tag(self, key: str, value: str) -> None:
        if self._client is not None:
            self._client.set_tag(self.run_id, _key(key), _shortened(value, _TAG_CHARACTERS))

    def _close(self, status: str) -> None:
        try:
            if self._monitor is not None:
                self._monitor.finish()
                # It ends without what it collected last; of a run shorter than its interval that is all.
                self._monitor.collect_metrics()
                self._monitor.publish_metrics(self._monitor.aggregate_metrics())
                self._monitor.mlflow_logger.flush()
        finally:
            if self._client is not None:
                self._client.set_terminated(self.run_id, status=status)


def _key(name: str) -> str:
    """``name`` in the characters that MLflow takes in keys."""
    return posixpath.normpath(re.sub(r"[^\w\-. /]", "_", name)).lstrip("/.")[:_KEY_CHARACTERS]


def _shortened(value: Any, characters: int) -> str:
    text = str(value)
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
