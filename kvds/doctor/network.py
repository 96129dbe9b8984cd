"""An all-reduce over the backend that a run would choose, between processes started here or a launcher's ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvds.distributed.operation_builds import BuildError, builds_under_way
from kvds.distributed.rank_environment import free_port
from kvds.doctor.finding import Finding, last_line

_ELEMENTS = 1 << 22
_REMEDY = (
    "export NCCL_SOCKET_IFNAME / GLOO_SOCKET_IFNAME=INTERFACE (ip -br addr lists them), NCCL_DEBUG=INFO says more; "
    "MASTER_ADDR must be reachable from every node"
)
_BUILD_FAILED = 4
_SCRIPT = """
import logging
logging.disable(logging.WARNING)
from kvds.distributed.operation_builds import BuildError
from kvds.doctor.network import all_reduce_here
try:
    text, right = all_reduce_here()
except BuildError as error:
    print(error)
    raise SystemExit(4)
from kvds.distributed.process_group import leave_distributed
leave_distributed()
print(text)
raise SystemExit(0 if right else 3)
"""


def all_reduce_here() -> tuple[str, bool]:
    """Join the process group and sum 16 MiB over it. Returns what was measured and whether the sum is right."""
    import deepspeed  # noqa: F401 - the same start as a run's, with its compiled operation
    import torch
    from torch import distributed as dist

    from kvds.distributed.process_group import init_distributed

    device = init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    values = torch.full((_ELEMENTS,), float(rank + 1), device=device)
    dist.all_reduce(values)  # the first call sets up connections
    values.fill_(float(rank + 1))
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    dist.all_reduce(values)
    first, last = float(values[0]), float(values[-1])
    seconds = time.perf_counter() - begun
    right = first == last == world * (world + 1) / 2
    backend = dist.get_backend()
    return f"{world} ranks over {backend}: 16 MiB in {1000 * seconds:.1f} ms" + ("" if right else ", wrong sum"), right


def check_all_reduce(ranks: int, *, seconds: float = 300.0) -> list[Finding]:
    """Start ``ranks`` processes on this machine and let them sum a tensor."""
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as scratch:
        logs = [Path(scratch) / f"rank{rank}" for rank in range(ranks)]
        running = []
        for rank, log in enumerate(logs):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as stream:
                running.append(
                    subprocess.Popen([sys.executable, "-c", _SCRIPT], env=environment, stdout=stream, stderr=stream)
                )
        deadline = time.monotonic() + seconds
        try:
            # When one rank fails the others would wait for it.
            while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            statuses = [process.poll() for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
        failed = next((rank for rank, status in enumerate(statuses) if status not in (0, None)), None)
        if failed is None and None in statuses:
            text = f"{ranks} ranks on this machine: no sum within {seconds:.0f} s"
            if builds := _builds_under_way():
                return [Finding("fault", "build", f"{text}; {builds}", "wait for that process, or stop it")]
            return [Finding("fault", "all-reduce", text, _REMEDY)]
        output = logs[failed or 0].read_text()
        said = last_line(output, "no reason given")
    if _BUILD_FAILED in statuses:
        return [_build_fault(output)]
    if failed is not None:
        return [Finding("fault", "all-reduce", f"{ranks} ranks on this machine, rank {failed}: {said}", _REMEDY)]
    return [Finding("ok", "all-reduce", said)]


def _build_fault(output: str) -> Finding:
    """What keeps an operation from being built: the last line, whole, with its remedy in it."""
    *_, said = output.strip().splitlines()
    return Finding("fault", "build", said, "then kvds doctor again")


def _builds_under_way() -> str:
    return "; ".join(f"{folder} is being built by {owner}" for folder, owner in builds_under_way())


def check_all_reduce_of_launch() -> list[Finding]:
    """Join the group of the launcher or ``srun`` that started this process on each rank."""
    try:
        text, right = all_reduce_here()
    except BuildError as error:
        return [_build_fault(str(error))]
    except Exception as error:  # each backend fails in its own way
        return [Finding("fault", "all-reduce", last_line(str(error), type(error).__name__), _REMEDY)]
    return [Finding("ok", "all-reduce", text) if right else Finding("fault", "all-reduce", text, _REMEDY)]
