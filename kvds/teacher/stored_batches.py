"""Stored batches: what a teacher's cache holds for micro-batches, read by threads to where a GPU copies from."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from kvds.data.batches import TokenBatch
from kvds.teacher.cache_shards import ShardReader

MOST_AHEAD = 2
"""Micro-batches that are read or wait to be taken, however many a step has; a thread each."""


def read_ahead_bytes(size: int, *, pinned: bool) -> int:
    """Most host memory that is held for one part of micro-batches of ``size`` bytes: of those that wait, of one that is
    being taken and of one that a GPU is still copying. torch gives out pinned memory in powers of two.
    """
    return (MOST_AHEAD + 2) * (1 << max(0, size - 1).bit_length() if pinned else size)


_Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class StoredBatch:
    """The stored positions of a micro-batch's samples, one after the other as they lie in the shards, and one of zeros.

    Attributes:
        parts: ``keys``, ``values`` or both, ``[N + 1, layers, heads, head_dim]`` each, on the CPU.
        rows: ``[2, B]`` int64, where each row's positions begin and how many it has.
    """

    parts: dict[str, Tensor]
    rows: Tensor

    def places(self, slots: Tensor) -> Tensor:
        """Where the ``slots``-th position of each row lies, ``[B, M]``; that of zeros where the row has
        none.

        Args:
            slots: ``[B, M]`` or ``[1, M]`` int64, on any device.
        """
        begins, counts = self.rows.to(slots.device, non_blocking=True)[..., None]
        zeros = len(next(iter(self.parts.values()))) - 1
        return (begins + slots).masked_fill(slots >= counts, zeros)


class StoredBatches:
    """Micro-batches of a cache: those that will be wanted are read ahead, at most :data:`MOST_AHEAD` of them.

    Args:
        reader: Of the shards.
        pin_memory: For a GPU. torch gives such memory to nobody else before a copy from it, on whichever stream, has
            run.
    """

    def __init__(self, reader: ShardReader, *, pin_memory: bool) -> None:
        self._reader, self._pin_memory = reader, pin_memory
        self._wanted: deque[_Rows] = deque()
        self._read_ahead: deque[tuple[_Rows, Future[StoredBatch]]] = deque()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(MOST_AHEAD, thread_name_prefix="kvds-teacher-cache")

    def want(self, batch: TokenBatch) -> None:
        """Say that a later :meth:`take` will ask for ``batch``; returns before it is read."""
        with self._lock:
            self._wanted.append(batch.row_samples)
            self._go_on()

    def take(self, batch: TokenBatch) -> StoredBatch:
        """What is stored for ``batch``, read now if nobody wanted it; what went wrong in reading it is raised here."""
        rows, ahead = batch.row_samples, None
        with self._lock:
            for entry in self._read_ahead:
                if entry[0] == rows:
                    ahead = entry[1]
                    self._read_ahead.remove(entry)
                    break
            else:
                if rows in self._wanted:
                    self._wanted.remove(rows)
            self._go_on()
        return self._read(rows) if ahead is None else ahead.result()

    def settle(self) -> None:
        """Wait until what is being read has been."""
        with self._lock:
            begun = [reading for _, reading in self._read_ahead]
        wait(begun)

    def drop(self) -> None:
        """Let go of all that is wanted and of what has been read for it."""
        with self._lock:
            self._wanted.clear()
            for _, reading in self._read_ahead:
                reading.cancel()
            self._read_ahead.clear()

    def _go_on(self) -> None:
        while self._wanted and len(self._read_ahead) < MOST_AHEAD:
            rows = self._wanted.popleft()
            self._read_ahead.append((rows, self._threads.submit(self._read, rows)))

    def _read(self, rows: _Rows) -> StoredBatch:
        reader, counts, total = self._reader, [], 0
        for row in rows:
            counts.append((total, sum(map(reader.count, row))))
            total += counts[-1][1]
        parts = {name: self._empty(total + 1, *reader.shape(name), dtype=reader.dtype) for name in reader.parts}
        begin = 0
        for number in (number for row in rows for number in row):
            end = begin + reader.count(number)
            for name, states in reader.sample(number).items():
                parts[name][begin:end] = states
            begin = end
        for part in parts.values():
            part[total:].zero_()
        return StoredBatch(parts, self._empty(2, len(rows), dtype=torch.int64).copy_(torch.tensor(counts).T))

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._pin_memory)
