"""Look over this machine before a run: each line is ok, a warning or a fault, with a remedy; exit status 1 on a fault.

Alone it checks this machine. Started on each rank by a launcher (srun kvds doctor, deepspeed --module kvds doctor)
the all-reduce runs over all of them, and one rank of each node reports.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvds.doctor.finding import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--output_dir", type=Path, metavar="DIR", default=Path("outputs"), help="where runs will lie")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes of the all-reduce; unset: one per GPU, 2 without one"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # what launchers pass on


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 where one is a fault."""
    from kvds.distributed.rank_environment import adopt_slurm_ranks
    from kvds.errors import InputError

    if arguments.ranks is not None and arguments.ranks < 1:
        raise InputError(f"--ranks {arguments.ranks}: expected at least 1")
    adopt_slurm_ranks()
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and arguments.ranks is not None:
        raise InputError(f"--ranks {arguments.ranks}: the launcher decides about ranks; expected no --ranks here")

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from kvds.doctor import kernel, network, software

    findings: list[Finding] = []
    reports = not launched or os.environ.get("LOCAL_RANK", "0") == "0"
    prefix = f"{platform.node()}: " if launched else ""

    def tell(found: list[Finding]) -> None:
        findings.extend(found)
        for finding in found if reports else ():
            print(f"{prefix}{finding}", flush=True)

    tell(software.check_versions())
    if any("torch is missing" in finding.text for finding in findings):
        return 1
    import torch

    ranks = arguments.ranks or max(torch.cuda.device_count(), 0) or 2
    with ThreadPoolExecutor() as beside:  # what takes longest is done by processes of its own meanwhile
        compared = beside.submit(kernel.check_kernel) if reports else None
        summed = None if launched else beside.submit(network.check_all_reduce, ranks)
        for check in _quick_checks(arguments.output_dir) if reports else ():
            tell(check())
        if sys.stderr.isatty() and reports:
            print("kernel and all-reduce: some ten seconds …", file=sys.stderr, flush=True)
        tell(compared.result() if compared else [])
        tell(summed.result() if summed else network.check_all_reduce_of_launch())
    return int(any(finding.level == "fault" for finding in findings))


def _quick_checks(output_dir: Path) -> tuple[Callable[[], list[Finding]], ...]:
    from kvds.doctor import software, storage

    return (
        software.check_devices,
        software.check_compiler,
        lambda: storage.check_space(output_dir),
        storage.check_caches,
        storage.check_offline,
        lambda: storage.check_sqlite(output_dir),
    )
