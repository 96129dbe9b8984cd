"""Guard of a run on each rank: its folder is its own, it may be asked to stop, and it ends when another rank does."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import distributed as dist

from kvds.checkpoint.run_folder import check_writable, make_folder
from kvds.config import RunConfig
from kvds.distributed.preemption import EXIT_CODE, PREEMPTED_FILE, Preempted, StopRequest
from kvds.distributed.process_group import from_first_rank
from kvds.distributed.rank_watch import RankWatch
from kvds.errors import RunError
from kvds.identity.folder_owner import FolderOwner

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
    """Within it rank 0 owns the output folder for all, and signals, the clock and the end of another rank are heeded;
    all ranks enter it, in their process group.

    Args:
        cfg: ``max_minutes``, ``rank_timeout`` and the output folder are read.
        stop: A request that already listens to signals; None: one of its own.

    Raises:
        InputError: another job owns the output folder, or it cannot be made.
        Preempted: the run was asked to stop; a checkpoint of its last step is saved and it is closed as KILLED.
    """
    own = stop is None
    stop = StopRequest().install() if stop is None else stop
    stop.max_minutes = cfg.max_minutes
    stop.join()
    guard = RunGuard(stop)
    main = dist.get_rank() == 0
    folder = Path(cfg.output_dir)
    marker = folder / PREEMPTED_FILE

    def end() -> None:  # what another job writes there now must not be mixed with a last word of this one
        error = RunError(owner.loss)
        print(f"\nkvds: error: {error}", file=sys.stderr, flush=True)
        watch.report(error)
        os._exit(1)

    def lost(code: int) -> None:
        guard.close("KILLED" if code == EXIT_CODE else "FAILED")
        if code == EXIT_CODE:
            mark(stop.reason or "another rank was asked to stop")

    def mark(reason: object) -> None:
        if main and owner.held:  # a launcher may have an exit code of its own: who starts the run again looks for it
            marker.write_text(f"{reason}\n")

    def heed_stop() -> None:
        if stop.reason is not None:
            raise Preempted(stop.reason)

    def take() -> None:
        check_writable(folder)
        make_folder(folder)
        owner.take(between=heed_stop)
        marker.unlink(missing_ok=True)  # an earlier start's; whoever looks for it asks about this one

    owner = FolderOwner(folder, on_lost=end)
    watch = RankWatch(cfg.rank_timeout, on_lost=lost)
    stop.leave_by(watch.leave)  # before another rank can wait for a word of this one
    watch.start()
    try:
        from_first_rank(take)
        try:
            yield guard
        except Preempted as reason:
            log.warning("stopping: %s", reason)
            if guard.run is not None:
                guard.run.save_before_leaving()
            raise
        guard.close("FINISHED")
    except Preempted as reason:
        guard.close("KILLED")
        mark(reason)
        watch.stop()
        raise
    except BaseException as error:
        watch.report(error)
        guard.close("FAILED")
        raise
    finally:
        owner.leave()
        watch.stop()
        if own:
            stop.remove()
