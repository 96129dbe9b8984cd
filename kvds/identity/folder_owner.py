"""Owner of a folder that jobs write to, one at a time: a second job is refused, a dead one's place is taken.

Owners are hidden files with rising numbers, and the highest number owns the folder until its file says that it has left
or its process is dead. Who wants the folder makes the file of the next number, and a file system (NFS, too) lets one
process alone make a name: a link to a file that is written already, so that no reader finds half of it. No decision
rests on deleting a file or on a lock that the system must keep. Two that found the same dead owner want the same
number; who comes so late that even a higher number is there sees it after its own and steps back.

A process of this machine is alive as long as its number and start are there. Of another machine's only signs of life
are seen: the time of its file, set anew every few seconds and compared with the file system's own clock. An owner that
was taken for dead (a machine that stood still) finds the higher number when it wakes, and is told.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvds.durable_files import json_text
from kvds.errors import InputError, one_line
from kvds.identity.process import start_ticks

BEAT_SECONDS = 5.0
# Without a sign of life for so long an owner on another machine is dead.
LOST_SECONDS = 60.0
_POLL_SECONDS = 0.5
_NAME = re.compile(r"\.owner(?:-(?P<share>\d+))?\.(?P<number>\d{6,12})\.json")


def _machine() -> str:
    """This run of this machine, or of this container: where process numbers mean the same."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


@dataclass(frozen=True)
class Owner:
    """Who owns a folder, as its file says.

    Attributes:
        number: Of the file.
        host: Name of the machine.
        machine: What tells it from another of that name.
        pid: The process there; 0 where it has left the folder.
        ticks: When that began.
        since: Seconds since the file was made.
        silent: Seconds since its last sign of life.
        beat: When that was, by the folder's clock.
        copied: Whether the file came here with a copy of the folder that it was made in.
    """

    number: int
    host: str
    machine: str
    pid: int
    ticks: str
    since: float
    silent: float
    beat: float
    copied: bool = False

    @property
    def lives(self) -> bool:
        """Whether it must be taken for alive."""
        if not self.pid or self.copied:
            return False
        if self.machine == _machine():
            return start_ticks(self.pid) == self.ticks
        return self.silent < LOST_SECONDS

    def __str__(self) -> str:
        return (
            f"process {self.pid} on {one_line(self.host)}, which took it {_age(self.since)} ago and gave its last sign "
            f"of life {_age(self.silent)} ago"
        )


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def living_owner(folder: Path, share: int = 0) -> Owner | None:
    """Who owns ``folder`` now; looks and writes nothing, so that another machine's clock is trusted."""
    found = _newest(folder, share)
    owner = None if found is None else _read(folder, share, found, time.time())
    return owner if owner is not None and owner.lives else None


def refusal(folder: Path, owner: Owner, flag: str = "output_dir") -> InputError:
    """What to say to a job that wants another's folder."""
    return InputError(
        f"{flag}={one_line(folder)}: belongs to {owner}; expected a folder that no other job writes to (wait for it, "
        f"stop it, or another --{flag})"
    )


class FolderOwner:
    """Holds a folder from :meth:`take` to :meth:`leave`; one process of a job does, for all of them.

    Args:
        folder: Of the job's output; it is there.
        flag: That named it, for messages.
        share: Processes that write a folder without talking to each other have one each, by its number.
        on_lost: Called from a thread where another job has taken the folder, this one having been taken for dead.
    """

    def __init__(
        self, folder: Path, *, flag: str = "output_dir", share: int = 0, on_lost: Callable[[], None] = lambda: None
    ) -> None:
        self._folder, self._flag, self._share, self._on_lost = folder, flag, share, on_lost
        self._number: int | None = None
        self._left = threading.Event()
        self._beating: threading.Thread | None = None

    def take(self, *, patience: float = 0.0, between: Callable[[], None] = lambda: None) -> FolderOwner:
        """Own the folder from here on.

        An owner on another machine that has been silent for a while is watched until it gives a sign of life or is
        dead.

        Args:
            patience: Seconds to wait for a living owner to leave.
            between: Called while waiting; may raise.

        Raises:
            InputError: another job owns it.
        """
        deadline = time.monotonic() + patience
        first: Owner | None = None
        while True:
            newest, owner = _newest(self._folder, self._share), None
            if newest is not None:
                owner = _read(self._folder, self._share, newest, _now(self._folder))
                if owner is None:  # it went while it was read: a higher number is there
                    continue
            if owner is not None and owner.lives:
                if first is None or first.number != owner.number:
                    first = owner
                # Here a process either is there or not; elsewhere a new sign of life says that it is.
                known = owner.machine == _machine() or owner.beat > first.beat
                if known and time.monotonic() >= deadline:
                    raise refusal(self._folder, owner, self._flag)
                between()
                time.sleep(_POLL_SECONDS)
                continue
            number = 1 if newest is None else newest + 1
            if self._make(number, os.getpid()) and self._is_newest(number):
                break
        self._number = number
        self._remove_below(number)
        self._beating = threading.Thread(target=self._beat, name="kvds-owner", daemon=True)
        self._beating.start()
        return self

    def leave(self) -> None:
        """Let the next job have the folder."""
        self._left.set()
        if self._beating is not None:
            self._beating.join()
        if self._number is None:
            return
        number, self._number = self._number, None
        with contextlib.suppress(OSError):  # who cannot say so is dead soon
            if self._is_newest(number) and self._make(number + 1, 0):
                self._remove_below(number + 1)

    @property
    def held(self) -> bool:
        """Whether the folder is this process's."""
        return self._number is not None

    @property
    def loss(self) -> str:
        """What to say where the folder is another job's."""
        return (
            f"{self._flag}={one_line(self._folder)}: another job owns the folder, this one having given no sign of "
            f"life for {LOST_SECONDS:.0f} s; nothing more is written there (another --{self._flag} for one of them)"
        )

    def __enter__(self) -> FolderOwner:
        return self if self.held else self.take()

    def __exit__(self, *_: object) -> None:
        self.leave()

    def _path(self, number: int) -> Path:
        return self._folder / _file_name(self._share, number)

    def _is_newest(self, number: int) -> bool:
        return _newest(self._folder, self._share) == number

    def _make(self, number: int, pid: int) -> bool:
        """Make the file of ``number``; False where another process has."""
        ticks = start_ticks(os.getpid()) or ""
        content = {
            "host": socket.gethostname(), "machine": _machine(), "pid": pid, "ticks": ticks, "since": time.time(),
            "folder": os.path.realpath(self._folder),
        }  # fmt: skip
        made = create_once(self._path(number), json_text(content))
        if made and not self._is_newest(number):  # too late: the numbers have gone on without it
            self._path(number).unlink(missing_ok=True)
            return False
        return made

    def _remove_below(self, number: int) -> None:
        for older in _numbers(self._folder, self._share):
            if older < number:
                with contextlib.suppress(OSError):
                    self._path(older).unlink()

    def _beat(self) -> None:
        number = self._number
        assert number is not None
        while not self._left.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a server that is away: who looks there sees nothing either
                newest = _newest(self._folder, self._share)
                if newest is not None and newest > number:
                    self._on_lost()
                    return
                try:
                    os.utime(self._path(number))
                except FileNotFoundError:  # somebody cleared the folder up, or NFS shows an old list of its names
                    self._make(number, os.getpid())


def create_once(path: Path, text: str) -> bool:
    """Make ``path`` with ``text`` as a whole, unless it is there; of several processes and machines one alone does.

    Returns:
        Whether this call did.

    Raises:
        OSError: it could not be written.
    """
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
            return True
        except OSError as error:
            if os.stat(aside).st_nlink == 2:  # the answer of a server was lost on the way
                return True
            if isinstance(error, FileExistsError):
                return False
        return _create_exclusively(path, text)  # a file system without links
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _create_exclusively(path: Path, text: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _file_name(share: int, number: int) -> str:
    return f".owner{f'-{share}' if share else ''}.{number:06d}.json"


def _numbers(folder: Path, share: int) -> Iterator[int]:
    for name in os.listdir(folder):
        match = _NAME.fullmatch(name)
        if match is not None and int(match["share"] or 0) == share:
            yield int(match["number"])


def _newest(folder: Path, share: int) -> int | None:
    try:
        return max(_numbers(folder, share), default=None)
    except FileNotFoundError:
        return None


def _now(folder: Path) -> float:
    """The time by the clock that the folder's files are dated by."""
    probe = folder / f".owner-clock.{uuid.uuid4().hex}"
    with probe.open("x"):
        now = probe.stat().st_mtime
    probe.unlink()
    return now


def _is_copy(folder: Path, home: str, name: str, found: os.stat_result) -> bool:
    """Whether an owner's file lies in a copy of its folder: the folder that it names is here, is another, and there
    the file goes on giving signs of life that do not reach this one.
    """
    try:
        return (
            bool(home) and not os.path.samefile(home, folder) and os.stat(Path(home, name)).st_mtime != found.st_mtime
        )
    except OSError:  # out of sight: nothing is known
        return False


def _read(folder: Path, share: int, number: int, now: float) -> Owner | None:
    """The owner of ``number``; None where its file is gone."""
    try:
        with (folder / _file_name(share, number)).open("rb") as file:  # opened, so that NFS asks its server
            found, text = os.fstat(file.fileno()), file.read()
    except FileNotFoundError:
        return None
    try:
        content: dict[str, Any] = json.loads(text)
        host, machine, ticks = (str(content[name]) for name in ("host", "machine", "ticks"))
        pid, since = int(content["pid"]), float(content.get("since", 0.0))
    except (ValueError, KeyError, TypeError):  # half written: alive until it has been silent for long enough
        content, host, machine, pid, ticks, since = {}, "?", "?", -1, "", found.st_mtime
    silent = max(0.0, now - found.st_mtime)
    copied = _is_copy(folder, str(content.get("folder", "")), _file_name(share, number), found)
    return Owner(number, host, machine, pid, ticks, max(silent, now - since), silent, found.st_mtime, copied)
