"""Distil three students of the shipped teacher on built-in problems (task loss alone, flat, structured); compare them.

Under ZeRO-3 on two ranks, in a few minutes without a GPU: a table, a picture, the MLflow records.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from kvds.commands.output_folder import check_output
from kvds.config.extras import installed
from kvds.errors import RunError

ARMS = {"task_only": "none", "flat": "flat", "structured": "structured"}
_ROWS_PER_STEP = 16
# Without a GPU; what the caller has set stays.
_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "output", nargs="?", type=Path, default=Path("outputs/quickstart"), metavar="OUTPUT_DIR",
        help="for the three runs and the report (outputs/quickstart)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Train one after the other, report all; the first that fails ends it."""
    output: Path = arguments.output
    check_output(output)
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    environment = {**({} if gpus else _CPU), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **os.environ}
    begun = time.monotonic()
    for arm in ARMS:
        print(f"\n== {arm} ==", flush=True)
        status = _ended(arm_command(arm, output, gpus), environment)
        if status:
            raise RunError(f"{arm}: its launcher ended with status {status} (what it printed says why; kvds doctor)")
    from kvds.tracking.run_report import format_table, read_runs, write_report

    runs = [output / arm for arm in ARMS]
    written = write_report(runs, output)
    print(f"\n{format_table(read_runs(runs))}")
    print(f"\nThree students in {time.monotonic() - begun:.0f} seconds. Written:", *written)
    if installed("mlflow"):
        print(f"Look through the records: mlflow ui --backend-store-uri {_database(output)} --host 127.0.0.1")
    return 0


def _ended(command: list[str], environment: dict[str, str]) -> int:
    """The exit status of a launcher; what ends this process ends the ranks, too, which the launcher leaves behind."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)  # ranks save and end
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def arm_command(arm: str, output: Path, gpus: int) -> list[str]:
    """The command of one arm: two ranks, or one where there is a single GPU."""
    from kvds.distributed.rank_environment import quiet_port

    ranks = min(2, gpus) or 2
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", os.devnull),
        *("--num_accelerators", str(ranks), "--master_port", str(quiet_port()), "--module", "kvds", "distill"),
        *("--config", "quickstart", "--deepspeed_config", "zero3_fp32" if gpus else "zero3_cpu"),
        *("--alignment_mode", ARMS[arm], "--batch_size", str(_ROWS_PER_STEP // ranks), "--resume", "never"),
        *("--tracking_uri", _database(output), "--run_name", arm, "--output_dir", str(output / arm)),
    ]


def _database(output: Path) -> str:
    return f"sqlite:///{output.resolve() / 'mlflow.db'}"
