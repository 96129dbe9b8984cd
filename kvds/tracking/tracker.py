"""A run's records: ``metrics.jsonl`` always, and beside it what ``report_to`` names, so that no training step waits.

Rank 0 alone constructs a :class:`Tracker`. Whatever goes wrong with a record is told once and never stops a run.
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvds.config.extras import installed, missing
from kvds.errors import InputError
from kvds.tracking.metrics_file import METRICS_FILE, MetricsFile, read_metrics
from kvds.tracking.mlflow_writer import RUN_ID_FILE, MlflowWriter
from kvds.tracking.provenance import git_revision
from kvds.tracking.tensorboard_writer import TensorboardWriter
from kvds.tracking.wandb_writer import WandbWriter

log = logging.getLogger("kvds")


def _attempt_tags() -> dict[str, str]:
    revision = git_revision()
    commit = (
        {} if revision is None else {"git_revision": revision, "mlflow.source.git.commit": revision.partition("+")[0]}
    )
    return {"host": socket.gethostname(), **commit}


def default_tracking_uri(output_dir: str | Path) -> str:
    """The sqlite database inside a run's own folder."""
    return f"sqlite:///{Path(output_dir).resolve() / 'mlflow.db'}"


def ui_command(output_dir: str | Path, tracking_uri: str | None = None) -> str:
    """The shell command that opens MLflow's pages on the records of a run in ``output_dir``."""
    uri = tracking_uri or default_tracking_uri(output_dir)
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)} --host 127.0.0.1"


# The curves of the first experiment of a database: MLflow itself would open on the traces of an application.
UI_PAGE = "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART"


class Tracker:
    """Writes a run's metrics, parameters and artifacts. Constructed on rank 0 only.

    ``metrics.jsonl`` is written at once, a line per call of :meth:`log`; MLflow gets the same from a thread. On resume
    neither holds a step twice: the file drops records of later steps, and MLflow, which cannot forget, keeps those that
    it has and is sent only the missing ones.

    Args:
        output_dir: The run's folder; holds ``metrics.jsonl``, ``mlflow_run_id`` and, by default, ``mlflow.db`` and
            ``mlflow_artifacts/``.
        report_to: ``"mlflow"``, ``"tensorboard"``, ``"wandb"``; nothing but the file where it is empty or ``"none"``.
        tracking_uri: ``sqlite:///FILE.db`` or ``http(s)://SERVER``; None = ``mlflow.db`` in the folder.
        experiment_name: MLflow's experiment, made if missing; wandb's project.
        run_name: Name of the run.
        params: Settings; on resume, those that changed are recorded as tags ``resumed/NAME``.
        tags: Facts of this attempt; git revision and host are added.
        run_id: The MLflow run to go on with; None: a new run, or on resume the one named in ``mlflow_run_id``.
        resume_step: The optimizer step that a checkpoint was loaded from; None for a new run.
        system_metrics: Record CPU, memory, disk, network and GPU use of this host.
        finish_seconds: The longest that :meth:`finish` waits for MLflow.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        report_to: Sequence[str] = ("mlflow",),
        tracking_uri: str | None = None,
        experiment_name: str = "kvds",
        run_name: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        run_id: str | None = None,
        resume_step: int | None = None,
        system_metrics: bool = True,
        finish_seconds: float = 60.0,
    ) -> None:
        self._output_dir = Path(output_dir)
        self._warned = False
        self._finish_seconds = finish_seconds
        self._file: MetricsFile | None = None
        self._writer: MlflowWriter | None = None
        self._others: list[TensorboardWriter | WandbWriter] = []
        try:
            self._file = MetricsFile(self._output_dir / METRICS_FILE, resume_step=resume_step)
            run_id_file = self._output_dir / RUN_ID_FILE
            if resume_step is None:
                run_id_file.unlink(missing_ok=True)
            elif run_id is None and run_id_file.is_file():
                run_id = run_id_file.read_text(encoding="utf-8").strip() or None
        except OSError as error:
            self._warn(error)
        self._run_id = run_id
        backlog = self._records_so_far() if resume_step is not None else []
        name, tags = run_name or self._output_dir.name, {**_attempt_tags(), **(tags or {})}
        self._others = self._open_others(report_to, experiment_name, name, params or {}, tags, resume_step)
        if "mlflow" not in report_to:
            return
        if not installed("mlflow"):
            log.warning("records: %s; metrics.jsonl alone is written (or --report_to none)", missing("mlflow"))
            return
        # A dead server is told of in seconds, not minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        try:
            # Here and not in the thread: two threads that import the same packages can see each other's halves.
            import mlflow  # noqa: F401
        except Exception as error:  # an installation can be broken in any way
            self._warn(error)
            return
        self._writer = MlflowWriter(
            self._output_dir,
            tracking_uri=tracking_uri or default_tracking_uri(output_dir),
            experiment_name=experiment_name,
            run_name=name,
            params=params or {},
            tags=tags,
            run_id=run_id,
            resume_step=resume_step,
            system_metrics=system_metrics,
            warn=self._warn,
            backlog=backlog,
        )

    def _open_others(
        self, report_to: Sequence[str], experiment_name: str, run_name: str, params: Mapping[str, Any],
        tags: Mapping[str, str], resume_step: int | None,
    ) -> list[TensorboardWriter | WandbWriter]:  # fmt: skip
        found: list[TensorboardWriter | WandbWriter] = []
        known: dict[str, Any] = {"params": params, "tags": tags, "resume_step": resume_step}
        try:
            if "tensorboard" in report_to:
                found.append(TensorboardWriter(self._output_dir, **known))
            if "wandb" in report_to:
                names: dict[str, Any] = {"experiment_name": experiment_name, "run_name": run_name}
                found.append(WandbWriter(self._output_dir, **names, **known))
        except Exception as error:  # packages, networks and accounts fail in their own ways
            self._warn(error)
        return found

    def _tell(self, call: str, *arguments: Any) -> None:
        """Hand something to every tracker but MLflow, which has a thread."""
        for writer in self._others:
            try:
                getattr(writer, call)(*arguments)
            except Exception as error:  # as above
                self._warn(error)

    def _records_so_far(self) -> list[dict[str, float]]:
        try:
            return read_metrics(self._output_dir / METRICS_FILE)
        except InputError:  # told already, or set aside
            return []

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None while MLflow has not answered yet, or is off."""
        return (self._writer.run_id if self._writer is not None else None) or self._run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` after ``step`` optimizer steps. Values that are not finite become null in the file."""
        try:
            if self._file is not None:
                self._file.append(step, metrics)
        except (OSError, ValueError, TypeError) as error:
            self._warn(error)
        if self._writer is not None:
            self._writer.put_metrics(step, metrics)
        self._tell("put_metrics", step, metrics)

    def log_artifact(self, path: str | Path) -> None:
        """Copy a file or a folder to the run's artifacts."""
        if self._writer is not None:
            self._writer.put_artifact(Path(path))
        self._tell("put_artifact", Path(path))

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag of the run: a fact that turned up on the way."""
        if self._writer is not None:
            self._writer.put_tag(key, value)
        self._tell("put_tag", key, value)

    def flush(self, seconds: float = 30.0) -> None:
        """Wait, for MLflow at most ``seconds``, until all that was logged so far is written."""
        self._tell("flush")
        if self._writer is not None:
            self._writer.flush(seconds)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as ``"FINISHED"``, ``"FAILED"`` or ``"KILLED"`` within ``finish_seconds``; once is enough."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._tell("finish", status)
        self._others = []
        if self._writer is not None:
            self._run_id = self.run_id
            if not self._writer.finish(status, self._finish_seconds):
                self._warn(TimeoutError(f"MLflow did not take all records within {self._finish_seconds:.0f} s"))
            self._run_id = self._writer.run_id or self._run_id
            self._writer = None

    def _warn(self, error: BaseException) -> None:
        if not self._warned:
            self._warned = True
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            log.warning("records: %s; the run goes on, its records may have gaps (no further warning)", reason)
