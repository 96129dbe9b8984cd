"""Peak memory of a stretch of work: the allocator's on a GPU, the resident set's on Linux."""

from __future__ import annotations

from pathlib import Path

import torch


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


class MemoryPeak:
    """Bytes that a way of training needs.

    On a GPU, where several ways share weights in one process: what it holds between steps, plus the most that the step
    added. On the CPU, where each way gets a process of its own: the highest resident set of the process, less what was
    resident before anything was built.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._before = 0 if self._cuda else _status("VmRSS")

    def begin(self) -> None:
        """Start to watch."""
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def end(self, held: int) -> int:
        """The peak since ``begin``; ``held`` are the bytes that the way holds between steps."""
        if self._cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self._before + held
        return _status("VmHWM") - self._before
