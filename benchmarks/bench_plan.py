"""What ``kvds plan`` says against what runs really take: peak memory of small runs in one process on the CPU.

    python -m benchmarks.bench_plan            # writes benchmarks/results/PLAN.md and plan.csv

Each case is a real run (DeepSpeed engine, teacher, aligner, optimizer, a logged step) of one epoch of three steps. The
peak is that of torch's CPU allocator while the run trains: the running sum of the profiler's allocation events, kept
from before the first model is built. So it holds everything that torch allocates, kernels' own workspace included, and
nothing of the interpreter or of libraries.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from benchmarks.records import RESULTS, markdown_table, provenance, write_csv
from kvds.checkpoint.folder import CHECKPOINTS
from kvds.config.deepspeed_file import load_deepspeed_config
from kvds.config.recipe import parse_run_config
from kvds.data.synthetic import synthetic_examples
from kvds.distributed.process_group import init_distributed, leave_distributed
from kvds.plan.estimate import Machine, RunPlan
from kvds.training.run import TrainingRun

REPOSITORY = Path(__file__).resolve().parent.parent
BOUND = 0.15
TOKENIZER = REPOSITORY / "launch/quickstart_teacher"
SMALL = (
    "num_hidden_layers=4,hidden_size=256,intermediate_size=1024,num_attention_heads=8,num_key_value_heads=4,head_dim=32"
)
DEEP = (
    "num_hidden_layers=10,hidden_size=192,intermediate_size=512,num_attention_heads=6,num_key_value_heads=2,head_dim=32"
)
WIDE = (
    "num_hidden_layers=3,hidden_size=512,intermediate_size=1536,num_attention_heads=8,num_key_value_heads=8,head_dim=64"
)


@dataclass(frozen=True)
class Case:
    """A run: what is special about it, and its flags beyond the common ones."""

    name: str
    flags: dict[str, Any] = field(default_factory=dict)
    student: str = SMALL
    teacher: str = DEEP
    family: str = "qwen2"
    rows: str = "short"
    batch_size: int = 16


CASES = [
    Case("structured"),
    Case("structured, checkpointing", {"gradient_checkpointing": True}),
    Case("flat", {"alignment_mode": "flat"}, rows="long", batch_size=8),
    Case("task loss alone", {"alignment_mode": "none"}, student=DEEP),
    Case("long rows", rows="long", batch_size=8),
    Case("long rows, checkpointing", {"gradient_checkpointing": True}, rows="long", batch_size=16, student=DEEP),
    Case("logit distillation", {"logit_kd_weight": 0.5}, student=SMALL + ",vocab_size=20000",
         teacher=SMALL + ",vocab_size=20000"),
    Case("vocabulary of 50000", {}, student=DEEP + ",vocab_size=50000", rows="long", batch_size=8),
    Case("eager attention", {"attn_implementation": "eager"}, rows="long", batch_size=8),
    Case("SGD", {"optimizer": "sgd"}, student=WIDE),
    Case("ZeRO-2", {"deepspeed_config": "zero2"}, student=WIDE),
    Case("bf16", {"deepspeed_config": REPOSITORY / "ds_configs/zero3_cpu_bf16.json"}, batch_size=8,
         student="num_hidden_layers=3,hidden_size=128,intermediate_size=256,num_attention_heads=4,num_key_value_heads=2,"
                 "head_dim=32", teacher="num_hidden_layers=2"),
    Case("packed rows", {"packing": True}, rows="uneven"),
    Case("packed rows, a quarter of the tokens, checkpointing", {
        "packing": True, "kv_method": "uniform", "kv_budget": 0.25, "gradient_checkpointing": True}, rows="uneven",
         batch_size=16),
    Case("the teacher runs ahead", {"teacher_overlap": True, "gradient_checkpointing": True}, rows="long"),
    Case("handoff", {"handoff_weight": 1.0}, rows="long", batch_size=8),
    Case("handoff, short answers, values aligned", {"handoff_weight": 1.0, "kv_parts": "v"}),
    Case("handoff alone, all teacher layers", {"handoff_weight": 1.0, "alignment_mode": "none",
                                               "handoff_source_layers": 10}, rows="long", batch_size=8),
    Case("GPT-2", {}, family="gpt2", student="n_layer=6,n_embd=256,n_head=8", teacher="n_layer=8,n_embd=256,n_head=8"),
    Case("GPT-2, values alone, flat", {"kv_parts": "v", "alignment_mode": "flat"}, family="gpt2", rows="long",
         batch_size=8, student="n_layer=4,n_embd=256,n_head=8", teacher="n_layer=12,n_embd=384,n_head=8"),
    Case("Llama, values alone, own map per layer", {"kv_parts": "v"}, family="llama", student=SMALL, rows="long",
         batch_size=8),
    Case("towards the student, frozen", {"direction": "teacher_to_student", "aligner_update": "frozen",
                                         "map_start": "pca"}, rows="long", batch_size=8),
]  # fmt: skip


def _write_inputs(folder: Path) -> None:
    """Configurations of the families, rows of two lengths and of both, a ZeRO-2 file with buckets of a CPU's size."""
    common = {"vocab_size": 512, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}
    Qwen2Config(num_hidden_layers=2, hidden_size=128, intermediate_size=256, num_attention_heads=4,
                num_key_value_heads=2, **common).save_pretrained(folder / "qwen2")  # fmt: skip
    LlamaConfig(num_hidden_layers=2, hidden_size=128, intermediate_size=256, num_attention_heads=4,
                num_key_value_heads=2, **common).save_pretrained(folder / "llama")  # fmt: skip
    GPT2Config(n_layer=2, n_embd=128, n_head=4, n_positions=512, vocab_size=512, bos_token_id=0,
               eos_token_id=1).save_pretrained(folder / "gpt2")  # fmt: skip
    for name, repeats in (("short", (1,)), ("long", (12,)), ("uneven", (12, 1, 1, 1))):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number, example in enumerate(synthetic_examples("train", problems=64, seed=0)):
                rationale = " ".join([example.rationale] * repeats[number % len(repeats)])
                file.write(
                    json.dumps({"prompt": example.prompt, "rationale": rationale, "answer": example.answer}) + "\n"
                )
    zero2 = json.loads((REPOSITORY / "ds_configs/zero2_fp32.json").read_text())
    zero2["zero_optimization"] |= {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
    (folder / "zero2.json").write_text(json.dumps(zero2))


def _flags(case: Case, folder: Path) -> list[str]:
    values: dict[str, Any] = {
        "model_name": folder / case.family, "tokenizer_name": TOKENIZER, "teacher_init": "random",
        "student_init": "random", "student_config_overrides": case.student, "teacher_config_overrides": case.teacher,
        "datasets": folder / f"{case.rows}.jsonl", "subset_size": 3 * case.batch_size, "max_length": 448, "epochs": 1,
        "batch_size": case.batch_size, "kv_weight": 1.0, "calibration_batches": 1, "eval_subset_size": 0,
        "report_to": "none", "logging_steps": 1000, "resume": "never", "output_dir": folder / "run", "kv_parts": "kv",
        "deepspeed_config": REPOSITORY / "ds_configs/zero3_cpu.json", **case.flags,
    }  # fmt: skip
    if values["deepspeed_config"] == "zero2":
        values["deepspeed_config"] = folder / "zero2.json"
    return [token for key, value in values.items() for token in (f"--{key}", str(value))]


def measure(flags: list[str]) -> tuple[int, int]:
    """Peak bytes of torch's CPU allocator during training, and bytes of one checkpoint."""
    cfg = parse_run_config(flags)
    raw = load_deepspeed_config(cfg.deepspeed_config)
    device = init_distributed()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run = TrainingRun(cfg, raw, device)
        run._save = lambda: None  # type: ignore[method-assign]
        with record_function("kvds_fit"):
            run.fit()
    events = profiler.profiler.kineto_results.events()
    [(begin, end)] = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == "kvds_fit"]
    live = peak = 0
    for time, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += change
        if begin <= time <= end:
            peak = max(peak, live)
    run.checkpoints.save(run.step, {})
    disk = sum(f.stat().st_size for f in (run.output_dir / CHECKPOINTS / f"step-{run.step:06d}").rglob("*.pt"))
    run.engine.destroy()
    return peak, disk


def main() -> int:
    """Measure each case, compare, write the table; 1 where a case is off by more than the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of cases; nothing is written then")
    chosen = parser.parse_args().only
    logging.getLogger("kvds").setLevel(logging.ERROR)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_inputs(folder)
        for case in CASES:
            if chosen and case.name not in chosen:
                continue
            flags = _flags(case, folder)
            plan = RunPlan(parse_run_config(flags), Machine(0, 1, 2**40))
            peak, disk = measure(flags)
            rows.append({
                "case": case.name,
                "micro-batch": f"{plan.rows.largest.rows} × {plan.rows.largest.tokens}",
                "parameters (M)": round(plan.student_size.total / 1e6, 2),
                "measured (MiB)": round(peak / 2**20, 1),
                "planned (MiB)": round(plan.peak / 2**20, 1),
                "off by (%)": round(100 * (plan.peak / peak - 1), 1),
                "checkpoint (MiB)": round(disk / 2**20, 1),
                "planned checkpoint (MiB)": round(plan.checkpoint / 2**20, 1),
                "held": round(plan.states().held / 2**20, 1),
                "step": round(plan.step.peak / 2**20, 1),
                "update": round(plan.states().update / 2**20, 1),
            })  # fmt: skip
            print(rows[-1], flush=True)
            gc.collect()
    leave_distributed()
    worst = max(abs(row["off by (%)"]) for row in rows)
    table = markdown_table(rows, list(rows[0])[:-3])
    print(table, f"\nworst: {worst} %", sep="\n")
    if not chosen:
        facts = provenance(("torch", "deepspeed", "transformers"))
        write_csv(RESULTS / "plan.csv", [row | facts for row in rows])
        text = [
            "# `kvds plan` against measured memory", "",
            f"Made by `{facts['command']}` at revision {facts['git_revision']}: torch {facts['torch']}, DeepSpeed "
            f"{facts['deepspeed']}, transformers {facts['transformers']}, {facts['device']}.", "",
            *[line for line in (__doc__ or "").split("\n\n", 2)[2].strip().splitlines()], "", table, "",
            f"Worst: {worst} % (bound {100 * BOUND:.0f} %). One process: sharding over ranks is arithmetic there, "
            "not measured here, nor is a GPU's allocator.",
        ]  # fmt: skip
        (RESULTS / "PLAN.md").write_text("\n".join(text) + "\n")
    return int(worst > 100 * BOUND)


if __name__ == "__main__":
    sys.exit(main())
