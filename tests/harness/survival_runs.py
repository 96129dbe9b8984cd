"""Small runs with everything that has a memory switched on, and faults to inject into them at an exact moment."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from kvds.checkpoint.aligner_file import load_aligner
from kvds.data.tokenizer import train_problem_tokenizer
from tests.harness.forked_ranks import RankServer

REPOSITORY = Path(__file__).resolve().parents[2]


def make_models(folder: Path) -> None:
    """``folder/teacher``, ``folder/student`` (dropout, tied head) and ``folder/tokenizer``."""
    train_problem_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for name, seed, layers, hidden in (("teacher", 1, 2, 16), ("student", 2, 1, 8)):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(tokenizer), num_hidden_layers=layers, hidden_size=hidden, intermediate_size=16,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
            attention_dropout=0.1, initializer_range=0.3, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)


def flags(models: Path, output: Path, **changes: object) -> list[str]:
    """Adam with two rates and weight decay, warm-up and decay, accumulation, dropout, a calibrated weight that decays,
    means over 3 steps.

    18 rows in global batches of 4: an epoch ends in the middle of a step's batch.
    """
    values = {
        "teacher_name": models / "teacher", "student_name": models / "student", "tokenizer_name": models / "tokenizer",
        "datasets": "synthetic", "synthetic_problems": 18, "max_length": 64, "eval_subset_size": 0, "report_to": "none",
        "kv_weight": "auto:1.5", "kv_weight_schedule": "linear", "map_start": "procrustes", "calibration_batches": 1,
        "batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8, "save_steps": 3, "lr": 0.01,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.3, "logging_steps": 3, "rank_timeout": 60,
        "aligner_lr": 0.02, "weight_decay": 0.1, "kv_parts": "kv",
        "deepspeed_config": REPOSITORY / "ds_configs/zero3_cpu.json", "output_dir": output, **changes,
    }  # fmt: skip
    return [token for key, value in values.items() for token in (f"--{key}", str(value))]


Start = Callable[..., tuple[list[int | None], str]]


def starter(server: RankServer, folder: Path) -> Start:
    """A function that runs ``folder/NAME`` once to its end: exit codes and what the ranks wrote this time."""
    count = iter(range(1000))

    def start(name: str, *, ranks: int = 1, setup: str = "", **changes: object) -> tuple[list[int | None], str]:
        log = folder / f"{name}-{next(count)}.log"
        codes = server.start(flags(folder, folder / name, **changes), ranks=ranks, log=log, setup=setup).wait(300)
        return codes, log.read_text()

    return start


def cut(run: Path, copy: Path, step: int) -> Path:
    """A copy of a finished ``run`` as a power cut after its checkpoint of ``step`` would have left it."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("student", "map_aligner.pt", "eval.json"))
    for later in (copy / "checkpoints").glob("step-*"):
        if later.name > f"step-{step:06d}":
            shutil.rmtree(later)
    (copy / "checkpoints/latest").write_text(f"step-{step:06d}")
    return copy


def at_step(step: int, action: str, *, of_rank: int | None = None) -> str:
    """Statements for a rank to run first: do ``action`` when it asks for the batches of optimizer step ``step``."""
    who = "True" if of_rank is None else f"rank == {of_rank}"
    return f"""
import os, resource, signal, time
from kvds.data.loader import BatchLoader

def hooked(loader, step, ask=BatchLoader.step):
    if step == {step} and {who}:
        {action}
    return ask(loader, step)

BatchLoader.step = hooked
"""


def at_call(module: str, name: str, action: str) -> str:
    """Statements for a rank to run first: do ``action`` when a run calls ``NAME`` as ``MODULE`` knows it."""
    return f"""
import os, resource, signal
import {module}

def hooked(*arguments, ask={module}.{name}, **keywords):
    {action}
    return ask(*arguments, **keywords)

{module}.{name} = hooked
"""


def spoil(steps: range, change: str, *, of_rank: int) -> str:
    """Statements for a rank to run first: in these optimizer steps ``change`` (``* nan``, ``+ inf``) its task loss."""
    return f"""
from math import inf, nan
import kvds.distillation.module
from kvds.data.loader import BatchLoader

now = [-1]

def step(loader, step, ask=BatchLoader.step):
    now[0] = step
    return ask(loader, step)

def losses(*arguments, ask=kvds.distillation.module.head_losses, **keywords):
    found = ask(*arguments, **keywords)
    spoilt = now[0] in {steps} and rank == {of_rank}
    return found._replace(loss=found.loss {change}, task=found.task {change}) if spoilt else found

BatchLoader.step, kvds.distillation.module.head_losses = step, losses
"""


def records(run: Path) -> list[dict[str, float]]:
    """What was logged, without what a clock or the allocator says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def check_equal(straight: Path, other: Path) -> None:
    """Same records, same student, same map, to the bit; it did train."""
    assert records(straight) == records(other)
    weights = [load_file(run / "student/model.safetensors") for run in (straight, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    maps = [load_aligner(run / "map_aligner.pt").state_dict() for run in (straight, other)]
    assert maps[0].keys() == maps[1].keys() and all(torch.equal(maps[0][name], maps[1][name]) for name in maps[0])
    before = load_file(straight.parent / "student/model.safetensors")
    assert max(float((before[name] - weights[0][name]).abs().max()) for name in before) > 1e-3
