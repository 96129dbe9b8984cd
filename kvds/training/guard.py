"""Guard of a run on each rank: it may be asked to stop, and it ends when another rank does."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import distributed as dist

from kvds.config import RunConfig
from kvds.distributed.preemption import PREEMPTED_FILE, Preempted, StopRequest
from kvds.distributed.rank_watch import RankWatch

log = logging.getLogger("kvds")


class Run(Protocol):
    """What can be saved before it is left, and closed."""

    output_dir: Path

    def save_before_leaving(self) -> None:
        """Save a checkpoint of the last step, unless there is one; all ranks call it."""

    def close(self, status: str) -> None:
        """Tell the tracker how the run ended."""


class RunGuard:
    """The stop request of a run, and the run once it is built."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self.run: Run | None = None

    def close(self, status: str) -> None:
        """Close the run as ``FINISHED``, ``KILLED`` or ``FAILED``, if there is one."""
        if self.run is not None:
            self.run.close(status)


@contextlib.contextmanager
def guarded(cfg: RunConfig, stop: StopRequest | None = None) -> Iterator[RunGuard]:
    """Within it signals, the clock and the end of another rank are heeded; all ranks enter it, in their process group.

    Args:
        cfg: ``max_minutes``, ``rank_timeout`` and the output folder are read.
        stop: A request that already listens to signals; None: one of its own.

    Raises:
        Preempted: the run was asked to stop; a checkpoint of its last step is saved and it is closed as KILLED.
    """
    own = stop is None
    stop = StopRequest().install() if stop is None else stop
    stop.max_minutes = cfg.max_minutes
    stop.join()
    guard = RunGuard(stop)
    watch = RankWatch(cfg.rank_timeout, on_lost=lambda: guard.close("FAILED")).start()
    main = dist.get_rank() == 0
    marker = Path(cfg.output_dir) / PREEMPTED_FILE
    try:
        try:
            yield guard
        except Preempted as reason:
            log.warning("stopping: %s", reason)
            if guard.run is not None:
                guard.run.save_before_leaving()
            raise
        if main:  # a launcher may have an exit code of its own: who starts the run again can look for the file
            marker.unlink(missing_ok=True)
        guard.close("FINISHED")
    except Preempted as reason:
        guard.close("KILLED")
        if main and marker.parent.is_dir():
            marker.write_text(f"{reason}\n")
        watch.stop()
        raise
    except BaseException as error:
        watch.report(error)
        guard.close("FAILED")
        raise
    finally:
        watch.stop()
        if own:
            stop.remove()
