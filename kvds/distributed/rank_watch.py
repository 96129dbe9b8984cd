"""Rank watch: one rank dies or hangs, the others learn of it, one of them says which and why, and all end.

Each rank says once a second, in a thread of its own, that it lives, in the store that the process group was made with
(rank 0's, or torchrun's). Rank 0 reads all, the others read rank 0 and its verdict: what a second costs does not grow
with the square of the ranks. A rank that fails writes the verdict itself before it ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed as dist

from kvds.distributed.preemption import EXIT_CODE, early_words
from kvds.distributed.process_group import LOST_CONNECTION, ranks_meet
from kvds.durable_files import json_text
from kvds.errors import InputError, RunError, one_line
from kvds.identity.process import start_ticks

log = logging.getLogger("kvds")
_T = TypeVar("_T")

_INTERVAL = 1.0
# With a collective broken, a rank that has been silent for so long is the one that broke it.
_SUSPICIOUS_SECONDS = 4.0
# How long a failed collective waits for the rank that made it fail to be found, and rank 0 for the others to read why.
_EXPLANATION_SECONDS = 12.0
_BROKEN_COLLECTIVE = (*LOST_CONNECTION, "gloo", "NCCL", "ProcessGroup")
_attempts = 0


class RankWatch:
    """Watches over the ranks from :meth:`start` to :meth:`stop`; every rank has one.

    Args:
        timeout: Seconds without a sign of life after which a rank is lost.
        on_lost: Called once, with the exit code, before this process ends because of another rank; has a few seconds.
    """

    def __init__(self, timeout: float, on_lost: Callable[[int], None] = lambda code: None) -> None:
        self.on_lost = on_lost
        self._timeout = timeout
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._stopped = threading.Event()
        self._ends = threading.Lock()
        self._thread: threading.Thread | None = None
        self._store: Any = None
        self._asked: dict[str, Any] | None = None
        self._who: dict[int, dict[str, Any]] = {}

    def start(self) -> RankWatch:
        """Begin; all ranks call it, in their process group."""
        global _attempts
        if self._world == 1:
            return self
        _attempts += 1  # several runs of one process share the store
        with ranks_meet():
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self._timeout))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"kvds/{attempt}/{_attempts}", store)
            who = {"pid": os.getpid(), "host": socket.gethostname(), "since": start_ticks(os.getpid())}
            self._store.set(f"who{self._rank}", json_text(who))
            self._store.set(f"beat{self._rank}", "0")
            if self._rank == 0:
                self._store.set("verdict", "none")
                self._store.set("hurry", "no")
            dist.barrier()  # every key is there before anybody reads it
            self._who[0] = json.loads(self._store.get("who0"))
        self._thread = threading.Thread(target=self._watch, name="kvds-ranks", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End in good order: from now on this rank is expected to be silent."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            with contextlib.suppress(Exception):
                self._store.set(f"beat{self._rank}", "done")

    def report(self, error: BaseException) -> bool:
        """Tell the other ranks why this one ends; call before the process does.

        Returns:
            Whether ``error`` is the cause. Where it is only what another rank's end has led to, this call waits for
            that one to be found, and the process ends in here.
        """
        if self._thread is None or self._stopped.is_set():
            return True
        told = isinstance(error, InputError | RunError)
        text = one_line(error) if told else one_line(f"{type(error).__name__}: {error}")
        if not told and any(sign in text for sign in _BROKEN_COLLECTIVE):
            with contextlib.suppress(Exception):
                self._store.set("hurry", "yes")
            self._thread.join(_EXPLANATION_SECONDS)
        code = 2 if isinstance(error, InputError) else 1
        verdict = json_text({"rank": self._rank, "code": code, "text": f"ended with {text}", "shared": told})
        self._stopped.set()
        self._thread.join()
        try:
            mine = self._store.compare_set("verdict", "none", verdict).decode() == verdict
        except Exception:  # the store is gone with the rank that held it
            return True
        if not mine:
            if not told:
                self._end(json.loads(self._store.get("verdict")))
            with contextlib.suppress(Exception):  # all ranks have found the same fault
                self._store.add("read", 1)
        if self._rank == 0:
            self._await_readers()
        return True

    def leave(self, reason: str) -> None:
        """End all ranks with exit code 85, since this one was asked to stop and there is nothing to save."""
        verdict = self._asked = {"rank": self._rank, "code": EXIT_CODE, "text": early_words(reason)}
        if self._store is not None:
            with contextlib.suppress(Exception):
                _within(_SUSPICIOUS_SECONDS, self._store.compare_set, "verdict", "none", json_text(verdict))
        self._end(verdict)

    def _watch(self) -> None:
        seen = {rank: ("", time.monotonic()) for rank in (range(1, self._world) if self._rank == 0 else [0])}
        count, before = 0, time.monotonic()
        while not self._stopped.wait(_INTERVAL):
            count += 1
            # A machine that was paused or overloaded has kept this rank from listening: no silence of the others.
            deaf = max(0.0, time.monotonic() - before - 2 * _INTERVAL)
            seen = {rank: (beat, since + deaf) for rank, (beat, since) in seen.items()}
            before = time.monotonic()
            try:
                verdict, hurry, beats = _within(self._timeout, self._exchange, count, list(seen))
            except Exception as error:
                if self._asked is not None:  # and so was rank 0, which has left
                    self._end(self._asked)
                if not self._stopped.is_set():
                    self._end(self._verdict(0, f"its store does not answer, {one_line(error)[:60]}"))
                return
            if verdict != "none":
                self._end(json.loads(verdict))
            now = time.monotonic()
            seen |= {rank: (beat, now) for rank, beat in beats.items() if beat != seen[rank][0]}
            silence = {rank: now - since for rank, (beat, since) in seen.items() if beat != "done"}
            most = max(silence, key=lambda rank: silence[rank], default=None)
            if most is not None and silence[most] > (_SUSPICIOUS_SECONDS if hurry else self._timeout):
                self._condemn(most, silence[most])

    def _exchange(self, count: int, ranks: list[int]) -> tuple[str, bool, dict[int, str]]:
        """Say that this rank lives, and read the verdict, whether to hurry, and what ``ranks`` last said."""
        self._store.set(f"beat{self._rank}", str(count))
        beats = {rank: self._store.get(f"beat{rank}").decode() for rank in ranks}
        return self._store.get("verdict").decode(), self._store.get("hurry") == b"yes", beats

    def _condemn(self, rank: int, silent: float) -> None:
        if rank not in self._who:
            self._who[rank] = json.loads(self._store.get(f"who{rank}"))
        verdict = self._verdict(rank, f"no sign of life for {silent:.0f} s")
        with contextlib.suppress(Exception):
            self._store.compare_set("verdict", "none", json_text(verdict))
        self._end(verdict)

    def _verdict(self, rank: int, sign: str) -> dict[str, Any]:
        """What to say of a silent rank; one of this host that hangs is killed, since it would stay behind."""
        who = self._who[rank]
        here = who["host"] == socket.gethostname()
        living = here and start_ticks(who["pid"]) == who["since"]
        if living and rank != self._rank:
            with contextlib.suppress(OSError):
                os.kill(who["pid"], signal.SIGKILL)
        state = "hangs" if living else "is dead" if here else "is dead or hangs"
        return {"rank": rank, "code": 1, "text": f"{state} ({sign}; process {who['pid']} on {who['host']})"}

    def _end(self, verdict: dict[str, Any]) -> None:
        """End this process because of another rank."""
        lost, code = int(verdict["rank"]), int(verdict["code"])
        if verdict.get("shared") and self._stopped.wait(5 * _INTERVAL):
            return  # this rank has found the same fault itself
        if not self._ends.acquire(blocking=False):
            threading.Event().wait()  # another thread is about to
        if code == EXIT_CODE:
            if self._rank == 0:
                os.write(2, f"\nkvds: {verdict['text']}\n".encode())
        elif self._rank in (0 if lost else 1, lost):
            rest = "" if code == 2 else "; all ranks end, the last checkpoint is whole (start again with --resume auto)"
            # On a line of its own, below a progress bar.
            print(f"\nkvds: error: rank {lost} {verdict['text']}{rest}", file=sys.stderr, flush=True)
        last = threading.Thread(target=self.on_lost, args=(code,), daemon=True)
        last.start()
        last.join(5.0)
        with contextlib.suppress(Exception):
            _within(_INTERVAL, self._store.add, "read", 1)
        if self._rank == 0:
            self._await_readers()
        sys.stdout.flush()
        os._exit(code)

    def _await_readers(self) -> None:
        """Rank 0 may hold the store: it stays until the others have read the verdict."""
        deadline = time.monotonic() + _EXPLANATION_SECONDS / 2
        with contextlib.suppress(Exception):
            while self._store.add("read", 0) < self._world - 1 and time.monotonic() < deadline:
                time.sleep(0.1)


def _within(seconds: float, call: Callable[..., _T], *arguments: Any) -> _T:
    """``call(*arguments)``, given up after ``seconds``.

    A store whose host is stopped, not dead, keeps torch's client waiting for good, whatever timeout it was given: after
    the timeout it asks the host to forget the question, and waits for the answer to that.

    Raises:
        TimeoutError: no answer; the call may still be waiting in a thread that nobody waits for.
    """
    found: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call(*arguments))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="kvds-store", daemon=True)
    thread.start()
    thread.join(seconds)
    thread.join(2 * _INTERVAL)  # this machine may have been paused: then the answer comes now
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError(f"no answer for {seconds:.0f} s")
    return found[0]
