"""A rank of a run of ``kvds ab``, started by the ``deepspeed`` launcher; a worker that trains by itself calls
:func:`train_measured`.

Trains like ``launch/distill.py``, draws no report of the single run, and leaves ``ab.json``: what training took.
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__" and os.environ.get("DS_ACCELERATOR") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the launcher numbers ranks on the CPU as if they were GPUs

from kvds.config import RunConfig
from kvds.distributed.preemption import StopRequest
from kvds.durable_files import json_text
from kvds.training.rank import run_rank

MEASURED_FILE = "ab.json"


def train_measured(cfg: RunConfig, stop: StopRequest | None = None) -> None:
    """Train and write ``ab.json`` into the run's folder: wall seconds of rank 0, CPU seconds of all ranks together,
    without imports and what a launcher does before and after; parameters of student and map (0 without one).

    Raises:
        InputError, Preempted, RunError: see :func:`kvds.training.run.train`.
    """
    import torch
    from torch import distributed as dist

    from kvds.checkpoint.aligner_file import ALIGNER_FILE, load_aligner
    from kvds.checkpoint.export import STUDENT_FOLDER
    from kvds.distributed.process_group import all_reduce_sum, init_distributed
    from kvds.training.meters import forget_peak
    from kvds.training.run import train

    device = init_distributed()
    forget_peak(device)
    begun, begun_cpu = time.perf_counter(), time.process_time()
    train(cfg, stop, draw_report=False)
    seconds = time.perf_counter() - begun
    cpu_seconds = torch.tensor(time.process_time() - begun_cpu, dtype=torch.float64, device=device)
    all_reduce_sum(cpu_seconds)
    if dist.get_rank() == 0:
        folder = Path(cfg.output_dir)
        map_file = folder / ALIGNER_FILE
        map_parameters = load_aligner(map_file).parameters() if map_file.is_file() else ()
        measured = {
            "train_wall_seconds": seconds,
            "train_cpu_seconds": cpu_seconds.item(),
            "parameters/student": _parameters(folder / STUDENT_FOLDER),
            "parameters/aligner": sum(parameter.numel() for parameter in map_parameters),
        }
        (folder / MEASURED_FILE).write_text(json_text(measured) + "\n", encoding="utf-8")


def _parameters(model_folder: Path) -> int:
    """Numbers in a model's weight files; their headers alone are read."""
    from safetensors import safe_open

    count = 0
    for path in model_folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return count


if __name__ == "__main__":
    sys.exit(run_rank(sys.argv[1:], train_measured))
