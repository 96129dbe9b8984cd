"""How long a call of ``map_projection_loss`` keeps the host, and what it launches, measured without a GPU.

    export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=68719476736  # buffers come from the heap, once
    python -m benchmarks.map_projection.host_time                                # every form, microseconds and launches
    python -m benchmarks.map_projection.host_time --proj per_head --profile 25

Kernels go through Triton's own launch path, compiled for compute capability 9.0, up to a driver of which launches do
nothing. States lie on the CPU and are never written to; of torch's operations on small tensors, counted beside, the CPU
does the work that a GPU would queue. Times are those of the process on a core, which other processes do not lengthen.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import pstats
import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.map_projection.bench import DIRECTIONS, Cell, Inputs
from benchmarks.records import markdown_table

LAUNCHES: Counter[str] = Counter()


class _Launcher:
    """Counts what would run."""

    def __init__(self, source: Any, _: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, *_: Any) -> None:
        LAUNCHES[self.name] += 1


class _Utilities:
    """What Triton asks of a driver about a device and a kernel."""

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def load_binary(self, *_: Any) -> tuple[None, int, int, int, int]:
        return None, 0, 0, 0, 1024

    def unload_module(self, _: Any) -> None:
        """Nothing was loaded."""


class NoDevice:
    """A driver for a GPU that is not there."""

    utils = _Utilities()
    launcher_cls = _Launcher

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """An H200's."""
        return GPUTarget("cuda", 90, 32)


class Operations(TorchDispatchMode):
    """Counts torch's operations that do work on a device (views and allocations do none)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One more."""
        name = str(func)
        if not func.is_view and not name.startswith(
            ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view")
        ):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def pretend_hopper() -> None:
    """Let the operation take states on the CPU for states on an H200."""
    from kvds.ops import gluon_launch, triton_launch, triton_plan

    driver.set_active(NoDevice())  # type: ignore[arg-type]
    for module in (gluon_launch, triton_launch, triton_plan):
        for name, stand_in in (("processors", lambda _: 132), ("capability", lambda _: (9, 0))):
            if hasattr(module, name):
                setattr(module, name, stand_in)
    triton_plan._missing = lambda *_: None  # type: ignore[assignment]


def measure(cell: Cell, repeats: int, lines: int) -> dict[str, Any]:
    """A row: median and least microseconds of a call, launches, torch's operations."""
    inputs = Inputs(cell, torch.bfloat16, "cpu", filled=False)
    for _ in range(3):
        inputs.run("triton")
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        inputs.run("triton")
        taken.append(1e6 * (time.process_time() - start))
    LAUNCHES.clear()
    with Operations() as operations:
        inputs.run("triton")
    launches = dict(LAUNCHES)
    if lines:
        with cProfile.Profile(time.process_time) as profile:
            for _ in range(repeats):
                inputs.run("triton")
        pstats.Stats(profile).sort_stats("tottime").print_stats(lines)
        print(launches, dict(operations.names), sep="\n")
    row = {name: getattr(cell, name) for name in ("layer_map", "proj", "direction", "mode", "tokens")}
    return row | {
        "us": round(statistics.median(taken)), "least_us": round(min(taken)), "launches": sum(launches.values()),
        "torch_ops": sum(operations.names.values()),
    }  # fmt: skip


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layer_maps", nargs="+", choices=("dense", "sparse"), default=["dense"])
    parser.add_argument("--proj", nargs="+", choices=("shared", "per_head"), default=["shared", "per_head"])
    parser.add_argument("--modes", nargs="+", choices=("full", "forward", "project"), default=["full", "forward"])
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--profile", type=int, default=0, metavar="LINES", help="of cProfile's table, for each form")
    args = parser.parse_args()
    pretend_hopper()
    forms = itertools.product(args.layer_maps, args.proj, args.directions, args.modes)
    rows = [measure(Cell("qwen2", *form, args.tokens, "triton"), args.repeats, args.profile) for form in forms]
    print(markdown_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
