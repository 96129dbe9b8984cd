"""What the host spends on ZeRO: a step of a student of many small layers, task loss alone, on one rank.

    python -m benchmarks.bench_layer_gathering             # a CPU, about five minutes

Arms: stage 0, stage 2, stage 3 that gathers each projection and norm by itself (``parts``), and stage 3 that gathers
decoder layers whole (``layers``, what a run does). Each with and without recomputing activations. On a CPU the layers
are made narrow, so that next to nothing is computed and what is left is what the host does; on a GPU they have the
student's width and what counts is the time until the device is done. An arm is a process of its own, as DeepSpeed
replaces ``torch.nn.functional.linear`` under stage 3; processes take turns. Times are medians over steps, then over
turns; ratios are medians of the turns' own ratios. Writes ``layer_gathering_DEVICE.csv`` and prints the table.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.records import RESULTS, markdown_table, provenance, write_csv
from kvds.config.deepspeed_file import load_deepspeed_config
from kvds.config.engine_config import student_engine_config
from kvds.config.recipe import parse_run_config
from kvds.data.batches import TokenBatch
from kvds.data.labels import LabelledPositions
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.distributed.process_group import init_distributed, leave_distributed
from kvds.training.engine import build_engine

REPOSITORY = Path(__file__).resolve().parent.parent
ZERO: dict[str, dict[str, Any]] = {
    "stage0": {"stage": 0},
    "stage2": {"stage": 2},
    "parts": {"stage": 3, "leaf_module": {"classes": []}},
    "layers": {"stage": 3},
}
PHASES = ("forward", "backward", "optimizer")
WARMUP = 4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="of the student (24)")
    parser.add_argument("--hidden_size", type=int, help="unset: 64 on a CPU, 896 on a GPU")
    parser.add_argument("--rows", type=int, help="of 256 tokens on a GPU (32), of 16 on a CPU (1)")
    parser.add_argument("--steps", type=int, default=20, help="timed per process (20)")
    parser.add_argument("--turns", type=int, default=3, help="processes per arm (3)")
    parser.add_argument("--output", type=Path, help="CSV file (benchmarks/results/layer_gathering_DEVICE.csv)")
    parser.add_argument("--arm", choices=ZERO, help="run this one here and print its medians: what the processes do")
    parser.add_argument("--checkpointing", action="store_true", help="with --arm: recompute activations")
    return parser.parse_args()


def student_of(arguments: argparse.Namespace) -> Qwen2ForCausalLM:
    """Qwen2-0.5B's layers, of the width asked for, with a small vocabulary."""
    hidden = arguments.hidden_size or (896 if torch.cuda.is_available() else 64)
    heads = max(2, hidden // 64)
    heads -= heads % 2
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=512, num_hidden_layers=arguments.layers, hidden_size=heads * max(8, hidden // heads),
        intermediate_size=hidden * 11 // 2, num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True,
    ))  # fmt: skip


def run_arm(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds per phase of this process's arm, medians over its steps, and its last loss."""
    cuda = torch.cuda.is_available()
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    length, rows = (256, arguments.rows or 32) if cuda else (16, arguments.rows or 1)
    device = init_distributed()
    with tempfile.TemporaryDirectory() as folder:
        raw = json.loads((REPOSITORY / f"ds_configs/{'zero3' if cuda else 'zero3_cpu'}.json").read_text())
        zero = ZERO[arguments.arm]
        if zero["stage"] == 3:
            zero = raw["zero_optimization"] | zero
            if not cuda:
                zero["stage3_param_persistence_threshold"] = 1000  # narrow as they are, matrices shall be sharded
        raw["zero_optimization"] = zero
        if zero["stage"] == 0 and cuda:
            raw["data_types"] = {"grad_accum_dtype": "bf16"}  # DeepSpeed has no other bf16 without ZeRO
        config = Path(folder) / "deepspeed.json"
        config.write_text(json.dumps(raw))
        cfg = parse_run_config([
            "--student_name", "narrow", "--alignment_mode", "none", "--output_dir", f"{folder}/run", "--batch_size",
            str(rows), "--lr", "1e-4", "--deepspeed_config", str(config),
        ])  # fmt: skip
        engine_config = student_engine_config(load_deepspeed_config(cfg.deepspeed_config), cfg, 1)
        student = student_of(arguments).to(device)
        if arguments.checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        engine = build_engine(DistillationModule(student), cfg, engine_config, 1000)
    ids = torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(ids)
    batch = TokenBatch(ids, ones, ids, ones, torch.arange(rows), float(rows * length), 1.0)
    inputs = StepInput(batch.to(device), LabelledPositions.from_labels(ids).to(device), None, None, None, LossWeights())
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for step in range(WARMUP + arguments.steps):
        marks = [time.perf_counter()]
        loss, metrics = engine(step=inputs)
        wait()
        marks.append(time.perf_counter())
        engine.backward(loss)
        wait()
        marks.append(time.perf_counter())
        engine.step()
        wait()
        marks.append(time.perf_counter())
        if step >= WARMUP:
            for phase, begin, end in zip(PHASES, marks, marks[1:], strict=False):
                seconds[phase].append(end - begin)
    result = {phase: statistics.median(times) for phase, times in seconds.items()}
    leave_distributed()
    return result | {"loss": float(metrics["loss/task"])}


def child(arm: str, checkpointing: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_layer_gathering", "--arm", arm, "--steps", str(arguments.steps)]
    command += ["--layers", str(arguments.layers), *(["--checkpointing"] if checkpointing else [])]
    for name in ("hidden_size", "rows"):
        if getattr(arguments, name) is not None:
            command += [f"--{name}", str(getattr(arguments, name))]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    """All arms in turns; the table."""
    arguments = parse()
    logging.disable(logging.WARNING)
    if arguments.arm:
        result = run_arm(arguments)
        print(f"\n{json.dumps(result)}")
        return
    seen: dict[tuple[str, bool], list[dict[str, Any]]] = {(a, c): [] for c in (False, True) for a in ZERO}
    for _ in range(arguments.turns):
        for (arm, checkpointing), results in seen.items():
            results.append(child(arm, checkpointing, arguments))
            print(arm, checkpointing, results[-1], flush=True)
    rows = []
    for (arm, checkpointing), results in seen.items():
        step = [sum(r[phase] for phase in PHASES) for r in results]
        plain = [sum(r[phase] for phase in PHASES) for r in seen["stage0", checkpointing]]
        row: dict[str, Any] = {"arm": arm, "checkpointing": checkpointing, "layers": arguments.layers}
        row |= {f"{phase}_ms": 1000 * statistics.median(r[phase] for r in results) for phase in PHASES}
        row["of_stage0"] = statistics.median(a / b for a, b in zip(step, plain, strict=True))
        rows.append(row | {"last_loss": statistics.median(r["loss"] for r in results)})
    facts = provenance(("torch", "deepspeed", "transformers"))
    device = torch.cuda.get_device_name().split()[1].lower() if torch.cuda.is_available() else "cpu"
    output = arguments.output or RESULTS / f"layer_gathering_{device}.csv"
    write_csv(output, [row | facts for row in rows])
    print(markdown_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
