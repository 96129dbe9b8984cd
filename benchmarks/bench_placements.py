"""Where the teacher lives, measured: the same training step under each placement, on the ranks of one launch.

    deepspeed --num_accelerators 2 --module benchmarks.bench_placements   # writes results/PLACEMENTS.md, placements.csv

Student and rows are the same, the student's engine is ZeRO-3 throughout. The placements take turns, in an order drawn
anew, four steps each; ratios are medians of the turns' own ratios to ``replicated``. On the CPU both the ranks' own CPU
time (what they compute and copy) and the wall's is given, which holds the waiting, for neighbours on the machine, too.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from benchmarks.records import RESULTS, markdown_table, provenance, write_csv
from kvds import cli
from kvds.config.deepspeed_file import load_deepspeed_config
from kvds.config.recipe import parse_run_config
from kvds.distributed.process_group import init_distributed, leave_distributed
from kvds.teacher.teacher import Teacher
from kvds.training.run import TrainingRun

REPOSITORY = Path(__file__).resolve().parent.parent
PLACEMENTS = ("replicated", "zero3", "zero3_offload", "tensor_parallel", "cached")
STEPS = 4
TEACHER = "num_hidden_layers=8,hidden_size=256,intermediate_size=1024,num_attention_heads=4,num_key_value_heads=2"
STUDENT = "num_hidden_layers=6,hidden_size=128,intermediate_size=512,num_attention_heads=4,num_key_value_heads=2"


def flags(folder: Path, name: str, batch_size: int) -> list[str]:
    """Of the run under placement ``name``."""
    values: dict[str, Any] = {
        "model_name": REPOSITORY / "launch/quickstart_teacher", "teacher_init": "random", "student_init": "random",
        "teacher_config_overrides": TEACHER, "student_config_overrides": STUDENT, "datasets": "synthetic",
        "synthetic_problems": 512, "max_length": 128, "eval_subset_size": 0, "batch_size": batch_size, "kv_weight": 1.0,
        "calibration_batches": 1, "logging_steps": 10000, "max_steps": 10000, "report_to": "none", "resume": "never",
        "lr_scheduler_type": "constant", "kv_parts": "kv", "data_cache": folder / "rows", "output_dir": folder / name,
        "deepspeed_config": REPOSITORY / "ds_configs/zero3_cpu.json",
    }  # fmt: skip
    if torch.cuda.is_available():
        values["deepspeed_config"] = REPOSITORY / "ds_configs/zero3.json"
    if name == "cached":
        values["teacher_cache"] = folder / "cache"
    else:
        values["teacher_placement"] = name
    return [token for key, value in values.items() for token in (f"--{key}", str(value))]


def held_bytes(teacher: Any) -> int:
    """Of the teacher's weights on this rank, in its own memory or the host's."""
    if not isinstance(teacher, Teacher):
        return 0
    shards = (getattr(p, "ds_tensor", p) for p in teacher._backbone.parameters())
    return sum(shard.numel() * shard.element_size() for shard in shards)


def one_turn(run: TrainingRun) -> tuple[float, float]:
    """CPU seconds of this rank and wall seconds, per step."""
    run.total_steps = run.step + STEPS
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    run.fit()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.process_time() - cpu) / STEPS, (time.perf_counter() - wall) / STEPS


def main() -> None:
    """Measure; rank 0 writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16, help="rows per rank (16)")
    parser.add_argument("--turns", type=int, default=8, help="of each placement (8)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = init_distributed()
    logging.disable(logging.WARNING)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shared = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    online = flags(folder, "replicated", arguments.batch_size)
    store = "bf16" if torch.cuda.is_available() else "fp32"
    cli.main(["cache", "--output", str(folder / "cache"), "--store", store, "--shard_samples", "64", "--", *online])
    dist.barrier()
    runs: dict[str, TrainingRun] = {}
    for name in PLACEMENTS:
        cfg = parse_run_config(flags(folder, name, arguments.batch_size))
        runs[name] = TrainingRun(cfg, load_deepspeed_config(cfg.deepspeed_config), device)
        runs[name]._save = lambda: None  # type: ignore[method-assign]
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in PLACEMENTS}
    draw = random.Random(0)
    for turn in range(arguments.turns + 1):
        for name in draw.sample(PLACEMENTS, len(PLACEMENTS)):
            seconds = torch.tensor(one_turn(runs[name]), device=device, dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)  # a step is as long as the slowest rank's
            if turn:  # the first warms up
                cpu, wall = seconds.tolist()
                spent[name].append((cpu, wall))
    rows = []
    for name in PLACEMENTS:
        row: dict[str, Any] = {
            "placement": name,
            "teacher weights per rank (MiB)": sum(map(held_bytes, runs[name].teachers)) / 2**20,
        }
        for i, clock in enumerate(("CPU", "wall")):
            row[f"{clock} s per step"] = statistics.median(turn[i] for turn in spent[name])
            pairs = zip(spent[name], spent["replicated"], strict=True)
            row[f"{clock}, of replicated"] = statistics.median(a[i] / b[i] for a, b in pairs)
        rows.append(row)
    if rank == 0:
        facts = provenance(("torch", "deepspeed", "transformers")) | {
            "ranks": str(ranks),
            "turns": str(arguments.turns),
        }
        table = markdown_table(rows, list(rows[0]))
        text = [
            "# Where the teacher lives", "",
            f"Made by `deepspeed --num_accelerators {ranks} --module benchmarks.bench_placements` at revision "
            f"{facts['git_revision']}: torch {facts['torch']}, DeepSpeed {facts['deepspeed']}, {facts['device']}; "
            f"{ranks} ranks, {arguments.batch_size} rows each, {arguments.turns} turns of {STEPS} steps. Teacher of 8 "
            "layers × 256, student of 6 × 128.", "",
            *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(), "", table,
        ]  # fmt: skip
        write_csv(RESULTS / "placements.csv", [row | facts for row in rows])
        (RESULTS / "PLACEMENTS.md").write_text("\n".join(text) + "\n")
        print(table, flush=True)
    leave_distributed()
    os._exit(0)  # engines of five runs are not worth taking apart


if __name__ == "__main__":
    main()
