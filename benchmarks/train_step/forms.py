"""Training step in the forms that a batch can have: padded under a mask, without one, one row, compiled, under ZeRO;
and, in the last of the forms without ZeRO, with other losses.

    python -m benchmarks.train_step.forms --rows 32 128 256        # on a GPU: Qwen2-1.5B into Qwen2-0.5B, minutes
    python -m benchmarks.train_step.forms --pair tiny --rows 8 --zero_forms zero3_cpu   # anywhere

Keys and values by the default alignment, real GSM8K rows, the same samples in each form; a learning rate of (next to)
0, so that all forms see the same weights and their first losses compare. Forms without ZeRO share one process; those
under ZeRO have one each, as DeepSpeed replaces functions of torch. Batches and caches are read ahead as in training.
Times are the median over passes of a pass over all batches, from the first launch until the device is done. Writes
``step_forms_PAIR_DEVICE.csv`` and prints the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RESULTS, markdown_table, provenance, write_csv
from benchmarks.train_step.ahead import running_feed
from benchmarks.train_step.arms import time_forward
from benchmarks.train_step.fixed_sides import LOSSES, FixedSides
from benchmarks.train_step.workbench import (
    Clock,
    Pair,
    build_model,
    load_samples,
    make_loader,
    make_pair,
    needed_flops,
    peak_flops,
    real_tokens,
)
from kvds.align import build_aligner
from kvds.config.settings import AlignmentSettings
from kvds.data.batches import RowWidth, TokenBatch
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.data.model_inputs import repacked, unpacked
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import StepInput
from kvds.kv import KVShape, select_tokens
from kvds.models.compiled_layers import compile_layers
from kvds.training.input_feed import InputFeed

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_LENGTH = 512
PHASES = ("teacher", "forward", "align", "backward", "optimizer")  # the map and its loss are part of forward


@dataclass(frozen=True)
class Form:
    """What a batch looks like and how layers run.

    Attributes:
        masked: Padded rows under a mask, as if nobody knew where their padding is.
        one_row: All samples in one row (``--tokens_per_batch``).
        compiled: ``--compile on``.
        loss: Of :data:`LOSSES`.
    """

    masked: bool = False
    one_row: bool = False
    compiled: bool = False
    loss: str = "kv"


FORMS = {
    "padded, masked": Form(masked=True),
    "padded": Form(),
    "one row": Form(one_row=True),
    "one row, compiled": Form(one_row=True, compiled=True),
    **{f"one row, compiled; {loss}": Form(one_row=True, compiled=True, loss=loss) for loss in LOSSES if loss != "kv"},
}
# From what a run is fed to the metrics of a whole step's first micro-batch.
Take = Callable[[InputFeed], dict[str, torch.Tensor]]
PADDED, BEST = FORMS["padded"], FORMS["one row, compiled"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="qwen2", choices=("tiny", "small", "qwen2"))
    parser.add_argument("--data_dir", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 256], help="of a step (32 128 256)")
    parser.add_argument("--forms", nargs="*", choices=FORMS, help="without ZeRO (all that match keys and values)")
    parser.add_argument("--tokens_per_batch", type=int, default=40960, help="of one row (40960)")
    parser.add_argument("--zero_forms", nargs="*", default=["zero3"], help="files in ds_configs to measure (zero3)")
    parser.add_argument("--batches", type=int, default=4, help="steps of a pass (4)")
    parser.add_argument("--passes", type=int, default=3, help="over them (3)")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no further form after so many (8)")
    parser.add_argument("--output", type=Path, help="CSV file (benchmarks/results/step_forms_PAIR_DEVICE.csv)")
    parser.add_argument("--child", help="what a process of its own measures, as JSON")
    arguments = parser.parse_args(argv)
    if arguments.forms is None:
        arguments.forms = [name for name, form in FORMS.items() if form.loss == "kv"]
    return arguments


class Stage:
    """Rows, teacher and student that all forms of a process share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.pair: Pair = make_pair(arguments.pair, arguments.data_dir, None)
        count = min(7000, max(arguments.rows) * (arguments.batches + 1))
        self.samples: list[EncodedSample]
        self.samples, self.data = load_samples(arguments.data_dir, self.pair.student.vocab_size, MAX_LENGTH, count)
        self.student = build_model(self.pair.student, self.pair.dtype, self.device, 2).train()
        self.teacher_model = build_model(self.pair.teacher, self.pair.dtype, self.device, 1)
        self.clock = Clock(self.device)
        self.settings = AlignmentSettings(alignment_mode="structured")
        self.fixed = FixedSides(self.teacher_model, self.settings, self.samples, self.device)

    def module(self, loss: str) -> DistillationModule:
        """Student and aligner, where the loss reads one."""
        if not LOSSES[loss][0].kv:
            return DistillationModule(self.student, None)
        torch.manual_seed(0)
        shapes = [KVShape.from_config(config) for config in (self.pair.student, self.pair.teacher)]
        aligner = build_aligner(*shapes, self.settings).to(self.device)
        time_forward(aligner, self.clock)
        return DistillationModule(self.student, aligner)

    def builder(self, form: Form, rows: int) -> Callable[[int], list[TokenBatch]]:
        """From a step, the same after ``--batches``, to its micro-batches on the CPU."""
        how: dict[str, Any] = {}
        if form.one_row:
            budget = self.arguments.tokens_per_batch
            how = {"tokens_per_batch": budget, "width": RowWidth(64, budget), "longest": MAX_LENGTH}
        loader = make_loader(self.samples, rows, **how)

        def build(step: int) -> list[TokenBatch]:
            batches = loader.step(step % self.arguments.batches % loader.steps_per_epoch)
            return [replace(batch, pads_right=False) for batch in batches] if form.masked else batches

        return build

    def steps(self, form: Form, rows: int) -> list[list[TokenBatch]]:
        """The micro-batches of each step of a pass."""
        return list(map(self.builder(form, rows), range(self.arguments.batches)))

    def input(self, batch: TokenBatch, loss: str) -> StepInput:
        """What the student is given, the teacher run."""
        weights, teacher = LOSSES[loss][0], self.fixed.of(loss)
        labelled = LabelledPositions.from_labels(batch.labels).to(self.device)
        batch = batch.to(self.device)
        rows = unpacked(batch)
        selection = None
        if weights.kv:
            selection = repacked(select_tokens("full", None, rows.segment_ids, rows.attention_mask), batch)
        output = teacher(batch, selection) if teacher is not None else None
        head = teacher.head if teacher is not None and weights.logit_kd else None
        return StepInput(batch, labelled, selection, output, head, weights)

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, name: str, form: Form, rows: int, take: Take) -> dict[str, Any]:
        """One form's row of the table; ``take`` does a whole step and gives the metrics of its first micro-batch."""
        steps = self.steps(form, rows)
        padded = [batch for step in self.steps(PADDED, rows) for batch in step]
        count = len(steps)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with running_feed(
            self.builder(form, rows), (2 + self.arguments.passes) * count, lambda batch: self.input(batch, form.loss),
            self.fixed.of(form.loss), self.clock, self.device,
        ) as feed:  # fmt: skip
            begun = time.perf_counter()
            metrics = take(feed)
            self.wait()
            first = time.perf_counter() - begun
            for _ in range(2 * count - 1):  # every shape has been met
                take(feed)
            self.wait()
            self.clock.read()
            seconds = []
            for _ in range(self.arguments.passes):
                begun = time.perf_counter()
                for _ in range(count):
                    take(feed)
                self.wait()
                seconds.append(time.perf_counter() - begun)
        phases = self.clock.read()
        spent = statistics.median(seconds)
        weights, from_disk = LOSSES[form.loss]
        runs_teacher = (weights.kv or weights.logit_kd) and not from_disk
        need = sum(
            needed_flops(self.pair.student, batch, train=True, head=True)
            + runs_teacher * needed_flops(self.pair.teacher, batch, train=False, head=weights.logit_kd > 0)
            for batch in padded
        )
        peak = peak_flops(self.device, self.pair.dtype)
        done = count * self.arguments.passes
        return {
            "form": name, "rows": rows, "tokens_run": sum(b.input_ids.numel() for s in steps for b in s) / count,
            "micro_batches": sum(map(len, steps)) / count, "ms": 1000 * spent / count,
            "tokens_per_second": sum(map(real_tokens, padded)) / spent,
            "mfu_percent": "" if peak is None else 100 * need / spent / peak,
            **{f"{phase}_ms": 1000 * phases.get(phase, 0.0) / done for phase in PHASES},
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else "",
            "data": self.data, "first_step_s": first, "task": float(metrics["loss/task"]),
            "kv": float(metrics["loss/kv"]) if "loss/kv" in metrics else "", "note": "",
        }  # fmt: skip


def plain(stage: Stage, loss: str) -> Take:
    """A step without an engine: fused AdamW on the parameters as they are."""
    module = stage.module(loss)
    fused = stage.device.type == "cuda"
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, fused=fused)

    def take(feed: InputFeed) -> dict[str, torch.Tensor]:
        first, last = dict[str, torch.Tensor](), False
        while not last:
            micro, inputs = feed.take(LOSSES[loss][0], watch=False)
            last = micro.last
            with stage.clock.phase("forward"):
                total, metrics = module(inputs)
            feed.make_next()
            with stage.clock.phase("backward"):
                (total / micro.count).backward()
            first = first or metrics
        with stage.clock.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return first

    return take


def under_zero(stage: Stage, rows: int, name: str, form: Form) -> Take:
    """A step of the engine that a run with ``ds_configs/NAME.json`` builds."""
    from kvds.config.deepspeed_file import load_deepspeed_config
    from kvds.config.engine_config import student_engine_config
    from kvds.config.recipe import parse_run_config
    from kvds.training.engine import build_engine

    path = REPOSITORY / f"ds_configs/{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        cfg = parse_run_config([
            "--student_name", "student", "--alignment_mode", "none", "--output_dir", f"{folder}/run", "--batch_size",
            str(rows), "--lr", "1e-9", "--deepspeed_config", str(path), "--compile", "on" if form.compiled else "off",
        ])  # fmt: skip
        config = student_engine_config(load_deepspeed_config(cfg.deepspeed_config), cfg, 1)
        engine = build_engine(stage.module(form.loss), cfg, config, 10**6)

    def take(feed: InputFeed) -> dict[str, torch.Tensor]:
        first, last = dict[str, torch.Tensor](), False
        while not last:
            micro, inputs = feed.take(LOSSES[form.loss][0], watch=False)
            last = micro.last
            engine.set_gradient_accumulation_boundary(last)
            with stage.clock.phase("forward"):
                loss, metrics = engine(step=inputs)
            feed.make_next()
            with stage.clock.phase("backward"):
                engine.backward(loss / micro.count, scale_wrt_gas=False)
            with stage.clock.phase("optimizer"):
                engine.step()
            first = first or metrics
        return first

    return take


def child(arguments: argparse.Namespace) -> None:
    """What one process measures under ZeRO: forms of one configuration, a line of JSON each."""
    from kvds.distributed.process_group import init_distributed, leave_distributed

    asked = json.loads(arguments.child)
    init_distributed()
    stage = Stage(arguments)
    form = Form(**asked["form"])
    if form.compiled and stage.device.type == "cuda":
        compile_layers(stage.teacher_model)
    take = under_zero(stage, max(arguments.rows), asked["zero"], form)
    for rows in arguments.rows:
        print("RECORD" + json.dumps(stage.measure(asked["name"], form, rows, take)), flush=True)
    leave_distributed()


def start_child(arguments: argparse.Namespace, name: str, zero: str, form: Form, limit: float) -> list[dict[str, Any]]:
    """Its rows of the table; where it fails, one that says why."""
    flags = [
        f"--{key}={getattr(arguments, key)}" for key in ("pair", "data_dir", "tokens_per_batch", "batches", "passes")
    ]
    asked = json.dumps({"name": name, "zero": zero, "form": vars(form)})
    command = [sys.executable, "-m", "benchmarks.train_step.forms", *flags, "--child", asked, "--rows"]
    environment = {"OMP_NUM_THREADS": "4", "MASTER_PORT": str(20000 + os.getpid() % 20000)} | os.environ
    try:
        done = subprocess.run(
            command + [str(n) for n in arguments.rows], cwd=REPOSITORY, env=environment, capture_output=True, text=True,
            timeout=max(60.0, limit),
        )  # fmt: skip
        output, reason = done.stdout, done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired as error:
        output, reason = (error.stdout or b"").decode(), [f"not done in {limit:.0f} s"]
    rows = [json.loads(line.removeprefix("RECORD")) for line in output.splitlines() if line.startswith("RECORD")]
    return rows + [{"form": name, "rows": "", "note": text[:160]} for text in reason]


def plain_forms(
    arguments: argparse.Namespace, tell: Callable[[list[dict[str, Any]]], None], on_time: Callable[[], bool]
) -> None:
    """The forms without ZeRO, on one stage; compiled ones last, as layers stay compiled."""
    stage = Stage(arguments)
    for name in arguments.forms:
        form = FORMS[name]
        if form.compiled:
            compile_layers(stage.student)
            compile_layers(stage.teacher_model)
        for rows in arguments.rows:
            if on_time():
                try:
                    tell([stage.measure(name, form, rows, plain(stage, form.loss))])
                except torch.cuda.OutOfMemoryError as error:
                    tell([{"form": name, "rows": rows, "note": str(error).splitlines()[0][:160]}])
                stage.student.zero_grad(set_to_none=True)


def main(argv: list[str] | None = None) -> None:
    """All forms; the table."""
    arguments = parse(argv)
    logging.disable(logging.WARNING)
    if arguments.child:
        child(arguments)
        return
    begun = time.monotonic()
    table: list[dict[str, Any]] = []

    def tell(rows: list[dict[str, Any]]) -> None:
        table.extend(rows)
        for row in rows:
            print(
                {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )

    if arguments.forms:
        plain_forms(arguments, tell, lambda: time.monotonic() - begun < 60 * arguments.minutes)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for zero in arguments.zero_forms:
        left = 60 * arguments.minutes - (time.monotonic() - begun)
        if left > 20:
            tell(start_child(arguments, f"{zero}, one row, compiled", zero, BEST, left))
    facts = {"pair": arguments.pair, **provenance(("torch", "transformers", "deepspeed", "triton"))}
    device = torch.cuda.get_device_name().split()[1].lower() if torch.cuda.is_available() else "cpu"
    output = arguments.output or RESULTS / f"step_forms_{arguments.pair}_{device}.csv"
    write_csv(output, [row | facts for row in table])
    shown = [c for c in max(table, key=len) if c not in ("kv", "data", "note")] + ["note"]
    print(markdown_table(table, shown))


if __name__ == "__main__":
    main()
