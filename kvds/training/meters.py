"""Meters: seconds per phase, memory, and means over a logging interval; nothing here makes a step wait."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from kvds.distributed.process_group import all_reduce_max, all_reduce_sum


class PhaseTimer:
    """Seconds spent in named phases since the last :meth:`read`.

    On a GPU it records events and reads them at logging steps only; on the CPU, where work is done when a call returns,
    it reads the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside as ``name``."""
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            begun = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begun

    def read(self) -> dict[str, float]:
        """Seconds per phase since the last call; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._seconds[name] = self._seconds.get(name, 0.0) + start.elapsed_time(end) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, {}
        return seconds


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Peak and current memory of this rank: the GPU allocator's on a GPU, the process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, psutil.Process().memory_info().rss


def forget_peak(device: torch.device) -> None:
    """Let the peak of :func:`memory_bytes` begin anew, for a process that trains one run after the other."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux alone has it
            Path("/proc/self/clear_refs").write_text("5")


class IntervalMeter:
    """Running means of device scalars over the micro-batches of a logging interval, then over all ranks.

    Keys logged at each micro-batch are averaged over the interval, every optimizer step alike; the others over the
    calls that had them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}
        self._tokens = 0
        self._begun = time.perf_counter()

    def update(self, metrics: dict[str, Tensor], tokens: int = 0, *, share: float = 1.0) -> None:
        """Add one micro-batch.

        Args:
            metrics: Its values, on the device.
            tokens: Its real tokens, known without asking the device.
            share: What part of an optimizer step it is.
        """
        for key, value in metrics.items():
            value = value.float() if share == 1 else value.float() * share
            self._sums[key] = self._sums[key] + value if key in self._sums else value
            self._counts[key] = self._counts.get(key, 0) + share
        self._tokens += tokens

    def read(self, phases: dict[str, float]) -> dict[str, float]:
        """Means over interval and ranks, tokens per second over all ranks, phase seconds and memory as the slowest
        rank's.

        A collective call: every rank makes it at the same step.
        """
        elapsed = time.perf_counter() - self._begun
        # Ranks may lack a key where their micro-batch was all padding: agree on rank 0's notion through counts.
        keys = sorted(self._sums)
        gathered: list[list[str] | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, keys)
        keys = sorted({key for rank_keys in gathered if rank_keys for key in rank_keys})
        zero = torch.zeros((), device=self._device)
        sums = torch.stack([self._sums.get(key, zero).to(self._device, torch.float32) for key in keys] or [zero])
        counts = torch.tensor([self._counts.get(key, 0.0) for key in keys] or [0.0], device=self._device)
        totals = torch.stack([sums, counts])
        all_reduce_sum(totals)
        tokens = torch.tensor([float(self._tokens)], device=self._device, dtype=torch.float64)
        all_reduce_sum(tokens)
        peak, current = memory_bytes(self._device)
        names = sorted(phases)
        worst = torch.tensor([elapsed, peak, current, *(phases[name] for name in names)], dtype=torch.float64)
        worst = worst.to(self._device)
        all_reduce_max(worst)
        slowest = worst.tolist()
        result = dict(zip(keys, (totals[0] / totals[1].clamp_min(1e-9)).tolist(), strict=False))
        result |= {
            "perf/tokens_per_second": tokens.item() / slowest[0],
            "perf/peak_memory_bytes": slowest[1],
            "perf/memory_bytes": slowest[2],
            **{f"perf/seconds_{name}": value for name, value in zip(names, slowest[3:], strict=True)},
        }
        self.restart()
        return result

    def restart(self) -> None:
        """Begin a new interval now."""
        self._sums, self._counts = {}, {}
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin to count time and tokens anew: what was spent outside training, in evaluation or saving, is no part."""
        self._tokens = 0
        self._begun = time.perf_counter()

    def states(self) -> list[dict[str, tuple[float, float]]]:
        """Sum and count of each metric in the interval so far, of each rank; all ranks call it."""
        own = {key: (float(value), self._counts[key]) for key, value in self._sums.items()}
        everyone: list[dict[str, tuple[float, float]]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, own)
        return everyone

    def restore(self, states: list[dict[str, tuple[float, float]]]) -> None:
        """Go on with an interval that :meth:`states` of as many ranks, or of another number of them, has described."""
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        mine = [states[rank]] if len(states) == world else states if rank == 0 else []
        self.restart()
        for state in mine:
            for key, (value, count) in state.items():
                held = torch.tensor(value, dtype=torch.float32, device=self._device)
                self._sums[key] = self._sums[key] + held if key in self._sums else held
                self._counts[key] = self._counts.get(key, 0) + count
