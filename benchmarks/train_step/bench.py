"""A whole training step, side by side with what it must cost at least and with what one would use instead.

    python -m benchmarks.train_step.bench --data_dir DATA                  # small models, CPU or GPU
    python -m benchmarks.train_step.bench --pair qwen2 --data_dir DATA     # Qwen2-1.5B and 0.5B, random weights, bf16
    python -m benchmarks.train_step.bench --quick                          # a minute, no data needed
    python -m benchmarks.train_step.bench --pair qwen2 --data_dir DATA --profile kvds_structured kvds_structured_packed

All arms of a run share one teacher, one student, the rows and their batches. They take turns on each batch, in an order
drawn anew, so that neither a neighbour's load nor a warm card favours one; ratios are medians of the rounds' own
ratios. Writes a CSV row per arm and a picture below ``benchmarks/results/`` and prints the table last. TRL runs in the
interpreter that ``--trl_python`` names (default: this one), as a process of its own that takes its turns too.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.memory_peak import MemoryPeak
from benchmarks.records import revision, write_csv
from benchmarks.train_step.arms import ARMS, LR, ONLY_ON_GPU, Arm, Workbench
from benchmarks.train_step.profile import profile_arms
from benchmarks.train_step.report import PHASES, csv_row, draw_picture, format_table
from benchmarks.train_step.workbench import (
    Clock,
    Pair,
    device_name,
    load_samples,
    make_loader,
    make_pair,
    needed_flops,
    peak_flops,
    real_tokens,
)
from kvds.data.batches import TokenBatch
from kvds.tracking.provenance import typed_command

REPOSITORY = Path(__file__).resolve().parents[2]
CACHED = ("kvds_structured_cached", "kvds_structured_values_cached")
NO_TEACHER = ("task_only", "task_only_packed", "plain_task", *CACHED)
QUICK_ARMS = ("task_only", "teacher_forward", "kvds_flat", "kvds_structured", "earlier")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default=None, choices=("tiny", "small", "small_152k", "qwen2"), help="(small)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="unset: bf16 for qwen2 on a GPU, else fp32")
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per batch (8)")
    parser.add_argument("--max_length", type=int, default=512, help="tokens per row (512)")
    parser.add_argument("--rounds", type=int, default=20, help="batches that each arm is timed on (20)")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no further round after so many minutes (8)")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "trl_gkd"], help="(all)")
    parser.add_argument("--clock", choices=("wall", "cpu_time"), help="on the CPU; unset: cpu_time with one thread")
    parser.add_argument("--trl_python", default=sys.executable, help="interpreter with trl (this one)")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--name", help="of the files; unset: train_step_PAIR_DEVICE")
    parser.add_argument("--no_memory", action="store_true", help="leave out the CPU's memory pass, a process per arm")
    parser.add_argument(
        "--profile", nargs="+", choices=ARMS, metavar="ARM",
        help="in place of all else, write where a step's time goes, such as kvds_structured kvds_structured_packed",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny models, 3 rounds, few arms")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.batch_size, arguments.max_length = 3, 4, 256
    arguments.pair = arguments.pair or ("tiny" if arguments.quick else "small")
    every = [name for name in (*ARMS, "trl_gkd") if torch.cuda.is_available() or name not in ONLY_ON_GPU]
    arguments.arms = arguments.arms or (list(QUICK_ARMS) if arguments.quick else every)
    return arguments


class TrlProcess:
    """TRL's trainer in its own interpreter; raises ``RuntimeError`` with the reason where it cannot run."""

    def __init__(self, python: str, pair: Pair, batches: list[TokenBatch], device: torch.device, clock: Clock,
                 batch_size: int, tokenizer: Path, log: Path) -> None:  # fmt: skip
        self._folder = tempfile.TemporaryDirectory()
        spec = Path(self._folder.name) / "spec.pt"
        torch.save(
            {
                "teacher": pair.teacher, "student": pair.student, "dtype": pair.dtype, "device": str(device),
                "clock": None if clock.kind == "cuda_events" else clock.kind, "batch_size": batch_size, "lr": LR,
                "folder": self._folder.name, "tokenizer": str(tokenizer) if tokenizer.is_dir() else None,
                "batches": [
                    {"input_ids": b.input_ids, "attention_mask": b.attention_mask, "labels": b.labels} for b in batches
                ],
            },
            spec,
        )  # fmt: skip
        self._log = open(log, "w")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.train_step.trl", str(spec)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.versions = self._read(log)["ready"]

    def _read(self, log: Path | None = None) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            reason = log.read_text().strip().splitlines()[-1:] if log is not None else []
            raise RuntimeError(f"its process ended with {code}: {' '.join(reason)}")
        return json.loads(line)

    def step(self, number: int) -> dict[str, Any]:
        """One training step on batch ``number``."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._folder.cleanup()


def memory_of_arm(name: str, make: Any, batches: list[TokenBatch], shared: list[TokenBatch]) -> int:
    """Peak resident bytes of two steps of an arm, in a forked process of its own."""

    def run(pipe: Any) -> None:
        memory = MemoryPeak(torch.device("cpu"))
        arm = ARMS[name](make())
        for batch in (shared if arm.packed else batches)[:2]:
            arm.prepare(batch)
            arm.step(batch)
        pipe.send(memory.end(0))

    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=run, args=(send,))
    child.start()
    send.close()
    try:
        return int(receive.recv())
    except EOFError:
        return 0
    finally:
        child.join()


def measure(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run all arms; rows of the table, and what is true of the whole run."""
    begun = time.monotonic()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    pair = make_pair(arguments.pair, arguments.data_dir, arguments.dtype)
    clock = Clock(device, arguments.clock)
    count = min(7000, arguments.batch_size * (arguments.rounds + 2))
    samples, data = load_samples(arguments.data_dir, pair.student.vocab_size, arguments.max_length, count)
    loader = make_loader(samples, arguments.batch_size)
    batches = [loader.step(i)[0] for i in range(loader.steps_per_epoch)][: arguments.rounds]
    packer = make_loader(samples, arguments.batch_size, pack_to=arguments.max_length)
    shared = [packer.step(i)[0] for i in range(len(batches))]
    tokens = [real_tokens(batch) for batch in batches]
    names = [name for name in arguments.arms if name != "trl_gkd"]
    notes: dict[str, str] = {}

    def make() -> Workbench:
        return Workbench(
            pair, device, clock, samples=samples
        )  # fmt: skip

    peaks: dict[str, list[int]] = {name: [] for name in arguments.arms}
    if device.type == "cpu" and not arguments.no_memory:  # before this process has models or threads of its own
        for name in names:
            if name in CACHED:  # its process would have run the teacher to write the cache
                continue
            peaks[name].append(memory_of_arm(name, make, batches, shared))
    trl = None
    if "trl_gkd" in arguments.arms:
        log = arguments.output_dir / "train_step_trl.log"
        own = arguments.trl_python == sys.executable
        if own and importlib.util.find_spec("trl") is None:
            notes["trl_gkd"] = "not run: trl is not installed in this interpreter (--trl_python PATH)"
        else:
            try:
                tokenizer = arguments.data_dir / "tokenizers" / "qwen2"
                trl = TrlProcess(
                    arguments.trl_python, pair, batches, device, clock, arguments.batch_size, tokenizer, log
                )
                names.append("trl_gkd")
            except (RuntimeError, OSError) as error:
                notes["trl_gkd"] = f"not run: {error}"
    bench = make()
    arms: dict[str, Arm] = {}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    memory = MemoryPeak(device)

    def run(name: str, number: int) -> dict[str, float] | None:
        try:
            if name == "trl_gkd":
                assert trl is not None
                answer = trl.step(number)
                losses.setdefault(name, answer["loss"])
                peaks[name].append(answer["peak"])
                return answer["seconds"]
            if name not in arms:
                arms[name] = ARMS[name](bench)
            batch = (shared if arms[name].packed else batches)[number]
            memory.begin()
            arms[name].prepare(batch)
            with clock.phase("step"):
                loss = arms[name].step(batch)
            spent = clock.read()
            if device.type == "cuda":
                peaks[name].append(memory.end(arms[name].held()))
            losses.setdefault(name, float(loss))
            return spent
        except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
            notes[name] = f"not run: {str(error).splitlines()[0][:160]}"
            names.remove(name)
            clock.read()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            return None

    longest = max(range(len(batches)), key=lambda i: batches[i].input_ids.numel())
    # Warm-up, the longest first, so that no later batch grows the memory. On a GPU every batch: a shape that is new
    # costs more, and most arms would find theirs met by another already, those of packed rows would not.
    met = range(len(batches)) if device.type == "cuda" else (0,)
    for number in dict.fromkeys((longest, *met)):
        for name in list(names):
            run(name, number)
    for name in names:
        peaks[name] = peaks[name][:1] if device.type == "cpu" and name != "trl_gkd" else []
    losses.clear()
    draw = random.Random(0)
    done = 0
    for number in range(len(batches)):
        if time.monotonic() - begun > 60 * arguments.minutes and done:
            break
        for name in draw.sample(names, len(names)):
            spent = run(name, number)
            if spent is not None:
                seconds[name].append(spent)
        done += 1
    if trl is not None and "trl_gkd" in names:
        trl.close()

    table = []
    floor = None
    if {"task_only", "teacher_forward"} <= set(names):
        floor = [a["step"] + b["step"] for a, b in zip(seconds["task_only"], seconds["teacher_forward"], strict=True)]
    best = peak_flops(device, pair.dtype)
    for name in arguments.arms:
        row: dict[str, Any] = {"arm": name, "note": notes.get(name, "")}
        if name in names:
            per_phase = seconds[name]
            steps = [spent.get("step", sum(spent.values())) for spent in per_phase]
            used = tokens[: len(steps)]
            row["seconds_p50"] = statistics.median(steps)
            row["seconds_p20"], row["seconds_p80"] = quantile(steps, 0.2), quantile(steps, 0.8)
            row["tokens_per_second"] = sum(used) / sum(steps)
            row |= {f"seconds_{p}": statistics.median(s.get(p, 0.0) for s in per_phase) for p in PHASES}
            if f"{name}_packed" in names or name.endswith("_packed"):
                other = name.removesuffix("_packed") if name.endswith("_packed") else f"{name}_packed"
                pairs = zip(steps, (s["step"] for s in seconds.get(other, [])), strict=False)
                row["speed_to_other_rows"] = statistics.median([b / a for a, b in pairs] or [float("nan")])
            if floor is not None:
                row["ratio_to_floor"] = statistics.median(s / f for s, f in zip(steps, floor, strict=False))
                alone = zip(steps, (s["step"] for s in seconds["task_only"]), strict=False)
                row["speed_to_task_only"] = statistics.median(b / a for a, b in alone)
                row["alignment_share"] = 1 - 1 / row["ratio_to_floor"] if "kvds" in name or name == "earlier" else None
            row["peak_bytes"] = max(peaks[name], default=None)
            row["loss_first_batch"] = losses.get(name)
            if best is not None:
                trains, uses = name != "teacher_forward", name not in NO_TEACHER
                logits = name in ("kvds_logit_kd", "trl_gkd")
                need = sum(
                    (needed_flops(pair.student, b, train=True, head=True) if trains else 0.0)
                    + (needed_flops(pair.teacher, b, train=False, head=logits) if uses else 0.0)
                    for b in batches[: len(steps)]
                )
                row["mfu"] = need / sum(steps) / best
        table.append(row)
    padded, packed = (sum(b.input_ids.numel() for b in some) for some in (batches, shared))
    facts = {
        "pair": arguments.pair, "dtype": str(pair.dtype).removeprefix("torch."), "device": device_name(device),
        "clock": clock.kind, "threads": torch.get_num_threads(), "data": data, "batch_size": arguments.batch_size,
        "max_length": arguments.max_length, "rounds": done, "real_tokens": sum(tokens[:done]),
        "padding_share": round(1 - sum(tokens) / padded, 4),
        "padding_share_packed": round(1 - sum(tokens) / packed, 4), "vocab_size": pair.student.vocab_size,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "trl": trl.versions["trl"] if trl is not None else "", "git": revision(),
        "command": typed_command(),
    }  # fmt: skip
    return table, facts


def quantile(values: list[float], share: float) -> float:
    """The value below which ``share`` of them lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print."""
    arguments = parse(argv)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    if arguments.profile:
        pair = make_pair(arguments.pair, arguments.data_dir, arguments.dtype)
        for text in profile_arms(arguments, pair):
            print(text, flush=True)
        return 0
    table, facts = measure(arguments)
    place = "cpu" if not torch.cuda.is_available() else facts["device"].replace("NVIDIA ", "").split()[0].lower()
    stem = arguments.output_dir / (arguments.name or f"train_step_{arguments.pair}_{place}")
    write_csv(stem.with_suffix(".csv"), [csv_row(row) | facts for row in table])
    draw_picture(stem.with_suffix(".png"), table, facts)
    print(f"written: {stem}.csv .png")
    print(format_table(table, facts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
