"""Look over this machine before a run: each line is ok, a warning or a fault, with a remedy; exit status 1 on a fault.

Alone it checks this machine. Started on each rank by a launcher (srun kvds doctor, deepspeed --module kvds.cli doctor)
the all-reduce runs over all of them, and one rank of each node reports.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import warnings
from pathlib import Path


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
    from kvds.doctor import kernel, network, software, storage

    versions = software.check_versions()
    if any("torch is missing" in finding.text for finding in versions):
        for finding in versions:
            print(finding)
        return 1
    import torch

    findings = list(versions)
    ranks = arguments.ranks or max(torch.cuda.device_count(), 0) or 2
    reports = not launched or os.environ.get("LOCAL_RANK", "0") == "0"
    if reports:
        findings += [
            *software.check_devices(),
            *software.check_compiler(),
            *storage.check_space(arguments.output_dir),
            *storage.check_caches(),
            *storage.check_offline(),
            *storage.check_sqlite(arguments.output_dir),
            *kernel.check_kernel(),
        ]
    findings += network.check_all_reduce_of_launch() if launched else network.check_all_reduce(ranks)
    prefix = f"{platform.node()}: " if launched else ""
    if reports:
        print("\n".join(f"{prefix}{finding}" for finding in findings), flush=True)
    return int(any(finding.level == "fault" for finding in findings))
