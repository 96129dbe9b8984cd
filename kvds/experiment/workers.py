"""Worker processes: each trains one job after the other, and leaves nothing running when it ends or is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvds.distributed.preemption import EXIT_CODE
from kvds.durable_files import json_text
from kvds.errors import InputError
from kvds.experiment.launcher import check_devices

WORKER_MODULE = "kvds.experiment.worker_process"
_STOP_SECONDS = 5.0
# How a worker ends that was asked to stop: what it was doing is neither finished nor failed.
_STOPPED = (EXIT_CODE, -signal.SIGTERM, -signal.SIGINT)


def device_groups(devices: Sequence[str], ranks: int, *, in_process: bool = False) -> list[str]:
    """What each worker in turn gets to see: ``["0", "1", "2", "3"]`` on two ranks → ``["0,1", "2,3"]``.

    Args:
        devices: GPUs by number, ``"cpu"`` for none; without the launcher any value of CUDA_VISIBLE_DEVICES.
        ranks: Of a run: a GPU each.
        in_process: No launcher is used.

    Raises:
        InputError: a remainder, a GPU twice in a group, or a GPU that the launcher does not take.
    """
    text = "--devices " + ",".join(devices)
    if not all(device.strip() for device in devices):
        raise InputError(f"{text}: an empty name; expected such as 0,1 or cpu")
    gpus = [device.strip() for device in devices if device.strip() != "cpu"]
    if in_process or ranks == 1 or not gpus:
        groups = [device.strip() for device in devices]
    elif len(gpus) < len(devices) or len(gpus) % ranks:
        raise InputError(f"{text} --ranks {ranks}: expected {ranks} GPUs, or a multiple of it (or cpu alone)")
    else:
        groups = [",".join(gpus[first : first + ranks]) for first in range(0, len(gpus), ranks)]
    for group in groups:
        if group != "cpu" and not in_process:
            check_devices(group, ranks, "--devices")
    return groups


def worker_environment(number: int, groups: Sequence[str]) -> dict[str, str]:
    """Environment of worker ``number``: one thread, one of ``groups`` in turn, in no process group of the caller's.

    Args:
        number: From 0.
        groups: Values of CUDA_VISIBLE_DEVICES; ``"cpu"`` hides all GPUs; empty: as it is.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    if groups:
        group = groups[number % len(groups)]
        environment["CUDA_VISIBLE_DEVICES"] = "" if group == "cpu" else group
        if group == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
    return environment


class Worker:
    """A process that reads one job per line and answers each with one line.

    It leads a process group: a terminal's Ctrl-C reaches it through its caller alone, and launchers and ranks that it
    has started end with it.

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
            env=environment, process_group=0,
        )  # fmt: skip
        self._ending = threading.Lock()
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
            The answer; ``{"status": "failed", "error": …}`` where the process ended instead; None at the deadline, or
            where the process was asked to stop.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json_text(job) + "\n")
            self._process.stdin.flush()
        try:
            line = self._answers.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None
        if line is None:
            status = self._end()
            if status in _STOPPED:
                return None
            return {"status": "failed", "error": f"the worker ended with status {status} (see {self._log.name})"}
        return json.loads(line)

    def stop(self) -> None:
        """End the process, gently first, and whatever it has started."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self._process.pid, signal.SIGTERM)
                deadline = time.monotonic() + _STOP_SECONDS
                while time.monotonic() < deadline and not self._has_ended(os.WNOHANG):
                    time.sleep(0.02)
                os.killpg(self._process.pid, signal.SIGKILL)
        self._end()
        self._log.close()

    def _has_ended(self, flags: int = 0) -> bool:
        # Not reaped: as long as it is a zombie, no other group can have its number.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | flags) is not None

    def _end(self) -> int:
        """Wait until the process has ended, kill what is left of its group, and return its exit status."""
        with self._ending:
            if self._process.returncode is None:
                self._has_ended()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        return self._process.returncode
