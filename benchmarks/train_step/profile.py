"""Where the time of one arm's step goes: on the host and on the device, by operator, with all that makes the host wait.

``benchmarks.train_step.bench --profile ARM…`` calls it. A shape that is met for the first time costs more than one met
again (memory is asked for, attention is planned), so each batch runs twice before one is profiled.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.train_step.arms import ARMS, Arm, Workbench
from benchmarks.train_step.workbench import Clock, Pair, load_samples, make_loader
from kvds.data.batches import TokenBatch

# Names of CUDA's runtime in a trace, in the order of the summary.
_CALLS = {
    "launches": ("LaunchKernel",),
    "copies": ("MemcpyAsync",),
    "waits of the host": ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize"),
    "allocations": ("cudaMalloc", "cudaHostAlloc", "cudaFree"),
}
ROWS = 25
BATCHES = 4


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _timed(arm: Arm, batch: TokenBatch, device: torch.device) -> tuple[float, float]:
    """Milliseconds until the step has returned, and until the device is done."""
    arm.prepare(batch)
    _wait(device)
    begun = time.perf_counter()
    arm.step(batch)
    returned = time.perf_counter()
    _wait(device)
    return 1000 * (returned - begun), 1000 * (time.perf_counter() - begun)


def profile_arm(name: str, arm: Arm, batches: Sequence[TokenBatch], device: torch.device, file: Path) -> str:
    """Profile one step of an arm, after each of ``batches`` has run twice.

    Args:
        name: Of the arm, for the text.
        arm: The arm.
        batches: As it takes them; the last one is profiled.
        device: Where it runs.
        file: Gets the whole table.

    Returns:
        A few lines: milliseconds at the first meeting of a shape and again, host and device time, CUDA calls.
    """
    first, again, issued = [], [], []
    for batch in batches:
        first.append(_timed(arm, batch, device)[1])
        returned, done = _timed(arm, batch, device)
        again.append(done)
        issued.append(returned)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    arm.prepare(batches[-1])
    _wait(device)
    with profile(activities=kinds) as profiler:
        arm.step(batches[-1])
        _wait(device)
    events = profiler.key_averages()
    on_host = sum(event.self_cpu_time_total for event in events) / 1000
    on_device = sum(event.self_device_time_total for event in events) / 1000
    calls = {
        what: sum(event.count for event in events if any(part in event.key for part in parts))
        for what, parts in _CALLS.items()
    }
    shapes = " ".join("×".join(map(str, batch.input_ids.shape)) for batch in batches)
    lines = [
        f"{name}: batches of {shapes} tokens",
        f"  ms per step: {statistics.median(first):.1f} where the shape is new, {statistics.median(again):.1f} again, "
        f"of which the host issues for {statistics.median(issued):.1f}",
        f"  profiled: {on_host:.1f} ms of the host's, {on_device:.1f} ms of the device's; "
        + ", ".join(f"{count} {what}" for what, count in calls.items()),
    ]
    text = "\n".join(lines)
    tables = [events.table(sort_by="self_cpu_time_total", row_limit=ROWS, max_name_column_width=80)]
    if device.type == "cuda":
        tables.append(events.table(sort_by="self_device_time_total", row_limit=ROWS, max_name_column_width=80))
    file.write_text("\n\n".join([text, *tables]) + "\n")
    return text


def profile_arms(arguments: argparse.Namespace, pair: Pair) -> Iterator[str]:
    """Profile each arm of ``--profile`` in turn; yields a few lines for each, tables go to files."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows, longest = arguments.batch_size, arguments.max_length
    samples, _ = load_samples(arguments.data_dir, pair.student.vocab_size, longest, BATCHES * rows)
    bench = Workbench(pair, device, Clock(device, arguments.clock), samples=samples)
    for name in arguments.profile:
        arm = ARMS[name](bench)
        loader = make_loader(samples, rows, **({"pack_to": longest} if arm.packed else {}))
        batches = [loader.step(i)[0] for i in range(loader.steps_per_epoch)]
        file = arguments.output_dir / f"{arguments.name or 'train_step'}_profile_{name}.txt"
        yield f"{profile_arm(name, arm, batches, device, file)}\n  tables: {file}"
