"""Preemption: a run is asked to stop by SIGUSR1, SIGTERM, the end of its time, or a launcher that is gone.

Before training begins there is nothing to save: a rank that is asked to stop then ends at once, whatever it waits for.

Later a handler only sets a flag. Ranks get signals at different moments, one after the other or one alone, so the flag
is put together over all ranks once per step (and once per batch of calibration and evaluation): all of them leave the
same collective, save the checkpoint together and end with exit code 85, on which a batch script puts the job in the
queue again. The flags travel between hosts, over gloo; no device is waited for. Imports no torch before ranks are
joined.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from kvds.distributed.signal_listener import SignalListener

EXIT_CODE = 85
PREEMPTED_FILE = "preempted"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# A worker of `kvds ab` is nobody's launcher but stands above one, and may be killed as well.
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "torch/distributed", "kvds.experiment.worker_process")


class Preempted(Exception):
    """All ranks were asked to stop and have left the same step; the text says by what."""


def _process(pid: int) -> tuple[str, str, int] | None:
    """Start time (ticks since boot), command line and parent of a living process; None where it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    return None if fields[0] in "ZX" else (fields[19], command, int(fields[1]))


def launcher_chain(pid: int) -> list[tuple[int, str]]:
    """The launchers above process ``pid``, nearest first, as pid and start time; empty where none started it.

    ``deepspeed`` is two processes, and signals end the outer one without a word to the inner.
    """
    chain: list[tuple[int, str]] = []
    while (found := _process(pid)) is not None and (above := _process(found[2])) is not None:
        pid = found[2]
        if not any(name in above[1] for name in _LAUNCHERS) or "python" not in above[1].split(" ")[0]:
            break
        chain.append((pid, above[0]))
    return chain


def leave_at_once(reason: str) -> None:
    """End this process with exit code 85, in the middle of whatever its other threads do; rank 0 says why."""
    if os.environ.get("RANK", "0") == "0":
        # Past the streams: the main thread may be writing to one.
        os.write(2, f"\nkvds: {early_words(reason)}\n".encode())
    os._exit(EXIT_CODE)


def early_words(reason: str) -> str:
    """What to say of a stop before there was anything to save."""
    return f"stopped: {reason} before the first step; nothing is lost, the same command starts again"


class StopRequest:
    """Whether the ranks have been asked to stop.

    Args:
        max_minutes: Minutes after this process began at which it asks itself to stop; None: never.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.reason: str | None = None
        self.max_minutes = max_minutes
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None
        self._world_size = 1
        self._ended = threading.Event()
        self._leave: Callable[[str], None] | None = None
        self._leaves = threading.Lock()
        self._listener: SignalListener | None = None

    def ask(self, reason: str) -> None:
        """Ask to stop; returns at once, unless the process ends in here."""
        self.reason = self.reason or reason
        leave = self._leave
        if leave is not None and self._leaves.acquire(blocking=False):
            leave(self.reason)

    def install(self, leave: Callable[[str], None] | None = None) -> StopRequest:
        """Listen to signals and watch the launcher; the earlier the better: before, a signal just ends the process.

        Args:
            leave: Ends the process, called with the reason from some thread, where it is asked to stop before
                :meth:`save_first`; None: it is asked as later.
        """
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
            if leave is not None:
                self._leave, self._listener = leave, SignalListener(self._on_heard)
        launchers = launcher_chain(os.getpid())
        if launchers:
            threading.Thread(target=self._watch, args=(launchers,), name="kvds-launcher", daemon=True).start()
        return self

    def leave_by(self, leave: Callable[[str], None]) -> None:
        """Another way to end the process before :meth:`save_first`, where there is one."""
        if self._leave is not None:
            self._leave = leave

    def save_first(self) -> None:
        """From now on there is something to save: who is asked to stop is found by :meth:`agreed`."""
        self._leave = None
        if self._listener is not None:
            self._listener.stop()
            self._listener = None

    def remove(self) -> None:
        """Give the signals back to whoever had them."""
        self.save_first()
        self._ended.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def join(self) -> None:
        """Ask together with the other ranks from now on; all ranks call it, in their process group."""
        from torch import distributed as dist

        self._world_size = dist.get_world_size()
        if self._world_size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def agreed(self) -> str | None:
        """Why to stop, the same on all ranks, or None; all ranks call it equally often."""
        if self.max_minutes is not None and self.reason is None and _minutes_since_start() >= self.max_minutes:
            self.ask(f"--max_minutes {self.max_minutes:g} are over")
        if self._world_size == 1:
            return self.reason
        import torch
        from torch import distributed as dist

        flag = torch.tensor([self.reason is not None], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return (self.reason or "another rank was asked to stop") if int(flag) else None

    def check(self) -> None:
        """Leave a loop that holds nothing to save; all ranks call it equally often.

        Raises:
            Preempted: some rank was asked to stop.
        """
        reason = self.agreed()
        if reason is not None:
            raise Preempted(reason)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or f"{signal.Signals(number).name} arrived"

    def _on_heard(self, number: signal.Signals) -> None:
        if number in SIGNALS:
            self.ask(f"{number.name} arrived")

    def _watch(self, launchers: list[tuple[int, str]]) -> None:
        while not self._ended.wait(0.5):
            for pid, started in launchers:
                found = _process(pid)
                if found is None or found[0] != started:
                    self.ask(f"the launcher (process {pid}) is gone")
                    return


def _minutes_since_start() -> float:
    import psutil

    return (time.time() - psutil.Process().create_time()) / 60
