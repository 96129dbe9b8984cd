"""Fixed order of sums: the same step gives the same bits on a GPU, where torch's fastest kernels add gradients as they
come.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

# cuBLAS's own buffers, without which it chooses among streams: read when its first handle is made.
_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextlib.contextmanager
def fixed_order(asked: bool) -> Iterator[None]:
    """Within it, where it is asked for, torch uses deterministic algorithms alone; an operation that has none raises.

    Told only to warn, flash and memory-efficient attention would go on summing in any order. Memory that is not yet
    written to stays as it is: filling it costs time, and nothing here reads it.

    Args:
        asked: ``--deterministic``. Must be entered before anything runs on a GPU.
    """
    if not asked:
        yield
        return
    os.environ.setdefault(*_CUBLAS)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
