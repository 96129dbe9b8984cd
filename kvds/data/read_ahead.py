"""The batches of the next steps, built by a thread while the present step runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Context manager around ``make``: what it gives for each step, in order, made before it is asked for.

    A thread suffices: it builds a step's batches in a fraction of the time that the step takes, most of which is spent
    in kernels, without the interpreter's lock.

    Args:
        make: From a step to what it needs. Called by the thread alone, for one step after the other.
        steps: The steps.
        depth: How many finished ones may wait.
    """

    def __init__(self, make: Callable[[int], T], steps: range, *, depth: int = 2) -> None:
        self._make, self._steps = make, steps
        self._made: queue.Queue[tuple[int, T | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvds-read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        while self._thread.is_alive():  # it may be waiting for a place
            self._drop()
            self._thread.join(0.01)

    def take(self, step: int) -> T:
        """What ``make(step)`` gave; an error of it is raised here.

        Raises:
            RuntimeError: ``step`` is not the next one.
        """
        made, value, error = self._made.get()
        if error is not None:
            raise error
        if made != step:
            raise RuntimeError(f"step {step} was asked for, and {made} is next")
        return value  # type: ignore[return-value]

    def _drop(self) -> None:
        try:
            self._made.get_nowait()
        except queue.Empty:
            return

    def _run(self) -> None:
        for step in self._steps:
            if self._closed.is_set():
                return
            try:
                self._made.put((step, self._make(step), None))
            except BaseException as error:  # told where the step is asked for
                self._made.put((step, None, error))
                return
