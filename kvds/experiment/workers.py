"""Worker processes: each imports torch and DeepSpeed once, then trains one job after the other."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORKER_MODULE = "kvds.commands.ab_worker"
_STOP_SECONDS = 5.0


def worker_environment(number: int, devices: Sequence[str]) -> dict[str, str]:
    """Environment of worker ``number``: one thread, one of ``devices`` in turn, in no process group of the caller's.

    Args:
        number: From 0.
        devices: Values of CUDA_VISIBLE_DEVICES; ``"cpu"`` hides all GPUs; empty: as it is.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    if devices:
        device = devices[number % len(devices)]
        environment["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
        if device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
    return environment


class Worker:
    """A process that reads one job per line and answers each with one line.

    Args:
        log_path: What the process writes beside its answers is appended there.
        environment: Of the process.
        module: What it runs.
    """

    def __init__(self, log_path: Path, environment: dict[str, str], module: str = WORKER_MODULE) -> None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = log_path.open("a", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=environment,
        )  # fmt: skip
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, job: dict[str, Any], deadline: float | None) -> dict[str, Any] | None:
        """Hand over a job and wait.

        Args:
            job: What the process reads.
            deadline: ``time.monotonic()`` until which to wait; None: as long as it takes.

        Returns:
            The answer; ``{"status": "failed", "error": …}`` where the process ended instead; None at the deadline.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        try:
            line = self._answers.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None
        if line is None:
            status = self._process.wait()
            return {"status": "failed", "error": f"the worker ended with status {status} (see {self._log.name})"}
        return json.loads(line)

    def stop(self) -> None:
        """End the process, gently first."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
