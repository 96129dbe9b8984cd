"""Memory per GPU by part, work, time and disk of a recipe, from configurations alone; exit status 1: it does not fit.

Nothing is loaded but configurations and, where they lie here, tokenizer and rows (for their lengths).
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.errors import InputError

if TYPE_CHECKING:
    from kvds.config import RunConfig
    from kvds.plan.estimate import RunPlan
    from kvds.plan.phases import Phases

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("recipe", metavar="RECIPE", help="launch/recipes/NAME.yaml, or a run's config.yaml")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="per node; 0: one process on the CPU (1)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="(1)")
    parser.add_argument("--gpu-memory", default="80GiB", metavar="SIZE", help="of each GPU, such as 24GiB (80GiB)")
    parser.add_argument("--rows", type=int, metavar="N", help="training rows, where the data does not lie here")
    parser.add_argument("--tflops", type=float, default=990.0, metavar="X", help="of one GPU in bf16 (990, an H100)")
    parser.add_argument("--utilization", type=float, default=0.3, metavar="X", help="share that a run reaches (0.3)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings in place of the recipe's")


def parse_size(text: str, flag: str) -> int:
    """``"80GiB"`` → bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", text.strip(), re.IGNORECASE)
    size = 0 if match is None else int(float(match[1]) * _UNITS.get(match[2].upper(), 0))
    if size <= 0:
        raise InputError(f"{flag} {text}: expected a size such as 80GiB or 24GB")
    return size


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    if arguments.gpus < 0 or arguments.nodes < 1 or (arguments.rows is not None and arguments.rows < 1):
        raise InputError("--gpus, --nodes, --rows: expected --gpus of at least 0, the others of at least 1")
    if not arguments.tflops > 0 or not 0 < arguments.utilization <= 1:
        raise InputError("--tflops, --utilization: expected a number above 0, and a share in (0, 1]")
    memory = parse_size(arguments.gpu_memory, "--gpu-memory")
    flags = ["--config", arguments.recipe]
    for pair in arguments.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair}: expected KEY=VALUE such as batch_size=4")
        flags += [f"--{key}", *(value.split() if key == "datasets" else [value])]
    from kvds.config.recipe import load_recipe, parse_run_config

    if "output_dir" not in load_recipe(arguments.recipe):
        flags += ["--output_dir", "outputs/plan"]
    cfg = parse_run_config(flags)
    logging.getLogger("kvds").setLevel(logging.ERROR)
    from kvds.plan.estimate import Machine, RunPlan
    from kvds.plan.phases import Phases
    from kvds.plan.token_budget import with_token_budget

    _check_layers(cfg)
    machine = Machine(arguments.gpus, arguments.nodes, memory)
    plan = RunPlan(with_token_budget(cfg, machine), machine, arguments.rows)
    phases = Phases(plan)
    for line in plan_lines(plan, phases, arguments.tflops * 1e12 * arguments.utilization):
        print(line, flush=True)
    return 0 if plan.fits and not phases.tight else 1


def _check_layers(cfg: RunConfig) -> None:
    """Refuse what training refuses of models whose weights may be elsewhere."""
    from kvds.models.architecture import load_config
    from kvds.models.hub import folder_at_hand
    from kvds.models.weight_check import check_layers

    named = [("student", cfg.student), *(("teacher", name) for name in cfg.all_teachers if cfg.uses_teacher)]
    for flag, name in named:
        if getattr(cfg, f"{flag}_init") == "pretrained" and (folder := folder_at_hand(name)) is not None:
            config = load_config(name, getattr(cfg, f"{flag}_config_overrides"), flag=flag)
            check_layers(folder, config, f"--{flag}_name={name}", remedy=f"or --{flag}_init random")


def _adapted(plan: Any) -> str:
    """How many of the student's parameters adapters are, where these alone train."""
    size = plan.student_size
    return "" if size.trained == size.total else f" ({size.trained:,} of adapters, which alone train)"


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size / 10:
            return f"{count / size:.2f} {unit}"
    return f"{count / 2**10:.2f} KiB"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1.5:
        return f"{seconds:.1f} s"
    return f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.1f} min"


def plan_lines(plan: RunPlan, phases: Phases, flops_per_second: float) -> Iterator[str]:
    """The plan as text, each line as soon as it is known: what takes longest is the search for rows that would fit."""
    from kvds.plan.estimate import MOST_ROWS

    cfg, machine, states, step = plan.cfg, plan.machine, plan.states(), plan.step
    largest = plan.rows.largest
    where = f"{machine.nodes} × {machine.gpus} GPUs" if machine.gpus else f"{machine.nodes} CPU process"
    yield from (
        f"{where}, {cfg.deepspeed_config}, teacher {cfg.teacher_placement if plan.teacher_size else 'none'}, "
        f"micro-batch {largest.rows} × {largest.tokens} tokens ({plan.rows.note})",
        f"student {plan.student_size.total:,} parameters{_adapted(plan)}, aligner {plan.aligner_parameters:,}"
        + (f", map of the handoff {plan.map_parameters:,}" if plan.map_parameters else "")
        + (f", teacher {plan.teacher_size.total:,}" if plan.teacher_size else ""),
        "",
        "per GPU, held between steps" if machine.gpus else "held between steps",
    )

    def row(name: str, size: float) -> str:
        return f"  {name:<46} {_size(size):>12}"

    yield row("student and aligner weights", states.weights)
    yield row("fp32 copy for the optimizer", states.master)
    yield row("optimizer moments", states.optimizer)
    yield row("gradients", states.gradients)
    yield row("communication buckets", states.buckets)
    yield row(f"teacher weights ({cfg.teacher_placement})", states.teacher)
    if cfg.on_policy_share:
        yield row("the student once more, to write completions", states.copy)
    yield "during a micro-batch (not all at one moment)"
    yield row("whole weights of the student, gathered", states.gathered)
    yield row("whole weights of the teacher, gathered", states.teacher_gathered)
    state = "with" if cfg.gradient_checkpointing else "without"
    other = "without" if cfg.gradient_checkpointing else "with"
    yield row(f"activations, {state} checkpointing", step.activations)
    yield row(f"  (they would be, {other} checkpointing)", plan.other_activations)
    yield row("logits of one chunk", step.logits)
    what = "keys and values" if ALIGNMENT_MODES[cfg.alignment_mode].takes_kv else "hidden states"
    for number, size in enumerate(groups := plan.kv_by_group()):
        yield row(f"compared {what}, group {number + 1} of {len(groups)}", size)
    yield row("aligner: gradients of KV and workspace", step.aligner)
    if cfg.handoff_weight:
        yield row("handoff: answers over the mapped cache, and map", step.handoff)
    if step.teacher_ahead:
        yield row("the next micro-batch's teacher, ahead", step.teacher_ahead)
    yield row("optimizer step", states.update)
    yield ""
    for phase, peak in phases.peaks.items():
        yield row(f"peak in {phase}{', the largest' if phase == phases.largest else ''}", peak)
    if machine.gpus:
        yield row(f"usable of {_size(machine.gpu_memory)}", machine.usable)
    if plan.host:
        yield row("host memory per rank", plan.host)
    what = "samples" if cfg.packing or cfg.tokens_per_batch else "rows"
    yield from ("", f"{f'{what} per micro-batch that fit':<34}{'plain':>9}   checkpointing")
    most = plan.largest_rows()
    for placement in dict.fromkeys(name for name, _ in most):
        plain, recomputed = (
            f"{rows} or more" if rows >= MOST_ROWS else str(rows)
            for rows in (most[placement, checkpointing] for checkpointing in (False, True))
        )
        yield f"  teacher {placement:<22} {plain:>11} {recomputed:>15}"
    yield ""
    work = plan.work
    if work is None:
        yield "work: unknown without rows (--rows N)"
    else:
        seconds = work.total / (flops_per_second * machine.ranks)
        yield (
            f"work: {work.total:.3g} FLOPs per epoch (student {work.student:.3g}, teacher {work.teacher:.3g}, aligner "
            f"{work.aligner:.3g}), {plan.rows.steps} steps"
        )
        if machine.gpus:
            yield (
                f"time: {_duration(seconds)} per epoch at {flops_per_second / 1e12:.0f} TFLOP/s per GPU "
                f"(--tflops, --utilization), an estimate; {_duration(seconds * cfg.epochs)} for {cfg.epochs} epochs"
            )
    if cfg.on_policy_share:
        yield "writing completions takes time that is not reckoned (--on_policy_share): perf/seconds_generate tells"
    disk = (
        "" if plan.disk is None else f"; the output folder grows to {_size(plan.disk)} (--save_steps {cfg.save_steps})"
    )
    yield f"disk: {_size(plan.checkpoint)} per checkpoint{disk}"
    yield from (f"{phase} does not fit: {remedy}" for phase, remedy in phases.tight.items())
    if plan.fits:
        yield "training fits" if phases.tight else "fits"
    else:
        advice = plan.advice()
        yield ("does not fit; in the recipe:" if advice else "does not fit, and no setting here would make it; "
                     "expected more GPUs, or more memory on each")  # fmt: skip
        yield from (f"  {line}" for line in advice)
