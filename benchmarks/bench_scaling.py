"""Several GPUs of one host: whole runs through the ``deepspeed`` launcher, ZeRO-3, on 1, 2, … of them.

    python -m benchmarks.bench_scaling --data_dir DATA --gpus 1 2 4

Two questions. *Equality*: a Qwen2 pair of few layers in fp32 on one and the same global batch; how far the first losses
on N GPUs lie from those on one. *Weak scaling*: Qwen2-1.5B into Qwen2-0.5B (random weights, bf16, real GSM8K text), the
same rows per GPU whatever their number, for each placement of the teacher: real tokens/s, peak memory per GPU, share of
N times the speed of one GPU with a whole teacher; and, for a whole teacher, for each further ZeRO configuration
(``--stages``), beside one GPU under the same one. Both models are made once and read by every run, as real ones would
be. Speeds are medians of the run's second half; ``from_start`` is the mean over all of it, shapes that are met for the
first time included: further values of ``--pad_to_multiple_of`` are measured on one GPU to say what those cost. Runs are
one after the other. Writes ``scaling_DEVICE.csv`` and ``.md`` below ``--output_dir``; on a machine without a GPU
``--gpus`` counts CPU ranks, and the weak scaling is of a small pair.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RESULTS, markdown_table, provenance, write_csv
from benchmarks.train_step.workbench import build_model
from kvds.models.architecture import load_config
from kvds.tracking.metrics_file import METRICS_FILE, read_metrics

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = "num_hidden_layers={layers},hidden_size=256,intermediate_size=512,num_attention_heads=4,num_key_value_heads=2"
GLOBAL_BATCH = 16
QUESTIONS = ("equality", "weak")
# What is dealt out to several GPUs is nothing of its own on one.
NEEDS_SEVERAL = ("zero3", "tensor_parallel")
SPENT = ("teacher", "forward", "backward", "optimizer")
INTERVAL = 4
ROWS = 7000  # that GSM8K has to train on
PACKAGES = ("torch", "deepspeed", "transformers", "triton")


@dataclass(frozen=True)
class Case:
    """One run of the weak scaling."""

    gpus: int
    placement: str
    pad_to_multiple_of: int
    deepspeed_config: str


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch_size", type=int, default=32, help="rows per GPU of the weak scaling (32)")
    parser.add_argument("--steps", type=int, default=32, help=f"of the weak scaling, a multiple of {INTERVAL} (32)")
    parser.add_argument("--deepspeed_config", help="of the weak scaling (ds_configs/zero3.json or zero3_cpu.json)")
    parser.add_argument(
        "--stages", nargs="*", default=[], help="further files of ds_configs, with a whole teacher (none)"
    )
    parser.add_argument("--placements", nargs="+", default=["replicated", "zero3", "tensor_parallel", "zero3_offload"])
    parser.add_argument("--pad_to_multiple_of", nargs="+", type=int, default=[64, 1], help="of the weak scaling (64 1)")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--name", help="of the files; unset: scaling_DEVICE")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no further run after so many (9)")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    return parser.parse_args()


def train(gpus: int, flags: dict[str, Any], log: Path) -> list[dict[str, Any]]:
    """One run on ``gpus`` ranks; its metrics. It is ended once the last step is recorded: writing a checkpoint of the
    real pair would take as long as the steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = {"output_dir": f"{folder}/run", "report_to": "none", "resume": "never", "save_steps": 0,
                 "eval_subset_size": 0, "logging_steps": 1, "max_grad_norm": 1.0} | flags  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = ["deepspeed", "--num_accelerators", str(gpus), "launch/distill.py", *words]
        with log.open("a") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "deepspeed.launcher.runner", *command[1:]], cwd=REPOSITORY, env=environment,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                return _recorded(process, Path(folder) / "run" / METRICS_FILE, int(flags["max_steps"]))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _recorded(process: subprocess.Popen[bytes], file: Path, steps: int) -> list[dict[str, Any]]:
    """The metrics of a run, once the last of its ``steps`` is among them."""
    while True:
        ended = process.poll()
        records = read_metrics(file) if file.is_file() else []
        if any(record["step"] == steps and "perf/tokens_per_second" in record for record in records):
            return records
        if ended is not None:
            raise subprocess.CalledProcessError(ended, process.args)
        time.sleep(0.5)


def models(data_dir: Path) -> dict[str, Any]:
    return {
        "teacher_name": data_dir / "models" / "qwen2-1.5b", "student_name": data_dir / "models" / "qwen2-0.5b",
        "teacher_init": "random", "student_init": "random", "tokenizer_name": data_dir / "tokenizers" / "qwen2",
        "datasets": "gsm8k", "data_dir": data_dir, "kv_parts": "kv",
    }  # fmt: skip


def equality(gpus: int, data_dir: Path, config: str, log: Path) -> list[float]:
    """The first losses of a small pair on the same global batch."""
    flags = models(data_dir) | {
        "teacher_config_overrides": SMALL.format(layers=4), "student_config_overrides": SMALL.format(layers=3),
        "deepspeed_config": config, "batch_size": GLOBAL_BATCH // gpus, "max_steps": 8, "subset_size": 160,
        "lr": 1e-3, "kv_weight": 1.0,
    }  # fmt: skip
    return [record["loss/total"] for record in train(gpus, flags, log) if "loss/total" in record]


def make_models(data_dir: Path, folder: Path) -> dict[str, Any]:
    """Teacher and student with random weights on the disk; without a GPU a pair of few small layers."""
    cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    flags: dict[str, Any] = {"teacher_init": "pretrained", "student_init": "pretrained"}
    for seed, (role, name, layers) in enumerate((("teacher", "qwen2-1.5b", 4), ("student", "qwen2-0.5b", 3))):
        overrides = "" if cuda else SMALL.format(layers=layers)
        config = load_config(str(data_dir / "models" / name), overrides, flag=role)
        model = build_model(config, dtype, device, seed)
        model.save_pretrained(folder / role)
        flags[f"{role}_name"] = folder / role
        del model
    if cuda:
        torch.cuda.empty_cache()  # what the runs of other processes need
    return flags


def weak(case: Case, flags: dict[str, Any], how: argparse.Namespace, log: Path) -> Any:
    """A row of the table: the real pair, the same rows per GPU."""
    steps, gpus, placement, multiple = how.steps, case.gpus, case.placement, case.pad_to_multiple_of
    flags = models(how.data_dir) | flags | {
        "deepspeed_config": case.deepspeed_config,
        "batch_size": how.batch_size, "max_steps": steps, "subset_size": min(ROWS, how.batch_size * gpus * steps),
        "max_length": 512, "kv_weight": 1.0, "teacher_placement": placement, "calibration_batches": 1,
        "pad_to_multiple_of": multiple, "logging_steps": INTERVAL,
    }  # fmt: skip
    if placement == "tensor_parallel":
        flags["teacher_tp_size"] = 2
    records = [r for r in train(gpus, flags, log) if "perf/tokens_per_second" in r]
    late = records[len(records) // 2 :]
    row: dict[str, Any] = {
        "rows_per_gpu": how.batch_size, "steps": steps,
        "tokens_per_second": statistics.median(r["perf/tokens_per_second"] for r in late),
        # Intervals hold about equally many tokens.
        "from_start": statistics.harmonic_mean(r["perf/tokens_per_second"] for r in records),
        "peak_gib": max(r["perf/peak_memory_bytes"] for r in records) / 2**30,
    }  # fmt: skip
    for phase in SPENT:
        row[f"{phase}_ms"] = 1000 / INTERVAL * statistics.median(r[f"perf/seconds_{phase}"] for r in late)
    return row


def weak_cases(arguments: argparse.Namespace) -> list[Case]:
    """Every placement on every number of GPUs, further ZeRO configurations with a whole teacher, and after the first
    case one GPU with other paddings.
    """
    default = f"ds_configs/{'zero3' if torch.cuda.is_available() else 'zero3_cpu'}.json"
    config, (first, *others) = arguments.deepspeed_config or default, arguments.pad_to_multiple_of
    cases = [Case(gpus, placement, first, config) for placement in arguments.placements for gpus in arguments.gpus]
    cases = [case for case in cases if case.gpus > 1 or case.placement not in NEEDS_SEVERAL]
    cases[1:1] = [Case(min(arguments.gpus), "replicated", multiple, config) for multiple in others]
    further = [f"ds_configs/{name}.json" for name in arguments.stages]
    return cases + [Case(gpus, "replicated", first, name) for name in further for gpus in arguments.gpus]


def weak_scaling(arguments: argparse.Namespace, attempt: Any, log: Path) -> Iterator[dict[str, Any]]:
    """The table's rows."""
    alone: dict[str, float] = {}  # by configuration: the speed of one GPU with a whole teacher
    with tempfile.TemporaryDirectory() as folder:
        flags = make_models(arguments.data_dir, Path(folder))
        for case in weak_cases(arguments):
            row = {"question": "weak scaling", **vars(case)}
            row = attempt(row, lambda case=case: weak(case, flags, arguments, log))
            if "tokens_per_second" in row and case.pad_to_multiple_of == arguments.pad_to_multiple_of[0]:
                if case.gpus == 1 and case.placement == "replicated":
                    alone[case.deepspeed_config] = row["tokens_per_second"]
                if case.deepspeed_config in alone:
                    row["percent_of_linear"] = (
                        100 * row["tokens_per_second"] / (case.gpus * alone[case.deepspeed_config])
                    )
            yield row


def main() -> int:
    """Run all, write, print."""
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # runs have sessions of their own: leave none behind
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name().split()[1].lower() if cuda else "cpu"
    stem = arguments.output_dir / (arguments.name or f"scaling_{device}")
    log = stem.with_suffix(".log")
    begun = time.monotonic()
    rows: list[dict[str, Any]] = []

    def attempt(row: dict[str, Any], make: Any) -> dict[str, Any]:
        if time.monotonic() - begun > 60 * arguments.minutes:
            return row | {"note": "not started: out of time"}
        try:
            return row | make()
        except subprocess.CalledProcessError as error:  # its own text is the whole command, which the log has
            return row | {"note": f"failed: exit code {error.returncode}, see {log.name}"}
        except (OSError, ValueError, statistics.StatisticsError) as error:
            return row | {"note": f"failed: {error}"[:200]}

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        write_csv(stem.with_suffix(".csv"), [row | provenance(PACKAGES) for row in rows])

    config = "ds_configs/zero3_fp32.json" if cuda else "ds_configs/zero3_cpu.json"
    alone: list[float] = []
    for gpus in arguments.gpus if "equality" in arguments.questions else ():
        row = {"question": "equality", "gpus": gpus, "placement": "replicated", "rows_per_gpu": GLOBAL_BATCH // gpus}

        def compare(gpus: int = gpus) -> dict[str, Any]:
            losses = equality(gpus, arguments.data_dir, config, log)
            alone[:] = alone or losses
            worst = max(abs(a - b) / abs(b) for a, b in zip(losses, alone, strict=True))
            return {"steps": len(losses), "last_loss": losses[-1], "largest_relative_difference": worst}

        keep(attempt(row, compare))
    if "weak" in arguments.questions:
        for row in weak_scaling(arguments, attempt, log):
            keep(row)
    facts = provenance(PACKAGES)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    heading = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "command")
    table = markdown_table(rows, columns)
    stem.with_suffix(".md").write_text(f"# ZeRO-3 on several GPUs\n\n{heading}; `{facts['command']}`\n\n{table}\n")
    print(table)
    return int(any("failed" in str(row.get("note", "")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
