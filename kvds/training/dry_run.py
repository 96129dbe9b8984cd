"""``launch/distill.py --dry_run``: everything that a run does before its first step, without weights, ranks or traces.

What would end a run after an hour in the queue ends this in seconds, with the same line and exit code 2: every row of
every corpus is read, the models are built on the meta device, the headers of their weight files are read, DeepSpeed
reads its configuration for the number of ranks there will be, and memory and disk are reckoned for this machine.
Nothing is written to the output folder.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path

import torch

from kvds.checkpoint.folder import step_tag
from kvds.checkpoint.origin import fit_to_origin, read_origin
from kvds.checkpoint.run_folder import checkpoints_to_try, first_whole
from kvds.checkpoint.run_identity import check_identity, run_identity
from kvds.config import RunConfig
from kvds.config.deepspeed_file import compute_dtype, load_deepspeed_config
from kvds.data.loader import BatchLoader
from kvds.durable_files import existing_parent
from kvds.errors import InputError
from kvds.identity.folder_owner import living_owner, refusal
from kvds.plan.estimate import Machine, RunPlan
from kvds.plan.phases import Phases
from kvds.plan.rows import measured_rows
from kvds.plan.several import SeveralTeachersPlan
from kvds.plan.token_budget import with_token_budget
from kvds.training.run_checks import check_run

log = logging.getLogger("kvds")


def dry_run(cfg: RunConfig) -> None:
    """Check a run and print a summary; of several ranks only the first does.

    Raises:
        InputError: what would end the run, or keep it from ending well.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
    log.setLevel(logging.WARNING)
    machine = this_machine()
    raw = load_deepspeed_config(cfg.deepspeed_config)
    step = first_whole(Path(cfg.output_dir), checkpoints_to_try(cfg))
    lines = {"output": f"{cfg.output_dir}: " + ("a new run" if step is None else f"goes on from {step_tag(step)}")}
    owner = living_owner(Path(cfg.output_dir))
    if owner is not None:
        raise refusal(Path(cfg.output_dir), owner)
    if step is not None:
        origin, stage = read_origin(Path(cfg.output_dir), step), raw["zero_optimization"]["stage"]
        cfg = fit_to_origin(cfg, origin, step=step, world_size=machine.ranks, zero_stage=stage)
    cfg = with_token_budget(cfg, machine)
    for warning in cfg.warnings:
        log.warning("%s", warning)
    checked = check_run(cfg, raw, ranks=machine.ranks)
    tokenizer, data = checked.tokenizer, checked.data
    if step is not None:
        now = run_identity(cfg, tokenizer=tokenizer, models=checked.models, data=data, fetch=False)
        check_identity(cfg, origin, step, now)
    longest = max(len(sample.input_ids) for sample in data.loader.samples)
    lines["data"] = (
        f"{len(data.loader.samples)} rows of {' '.join(cfg.datasets)}, the longest {longest} of --max_length "
        f"{cfg.max_length} tokens; {len(data.eval_examples)} held out"
    )
    total_steps = cfg.max_steps or cfg.epochs * data.loader.steps_per_epoch
    rows = cfg.batch_size * cfg.gradient_accumulation_steps * machine.ranks
    lines["steps"] = (
        f"{total_steps} of {rows} rows ({cfg.batch_size} × {cfg.gradient_accumulation_steps} × {machine.ranks} ranks); "
        f"{cfg.deepspeed_config}, {compute_dtype(raw)}"
    )
    lines |= _resources(cfg, machine, data.loader, total_steps)
    print(f"dry run of {cfg.output_dir}")
    for name, text in lines.items():
        print(f"  {name:<8}{text}")
    print("nothing stands in the way; nothing was trained or written")


def this_machine() -> Machine:
    """The ranks that the launcher will have started (one where none did), on the devices that are here."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or min(ranks, torch.cuda.device_count()))
        return Machine(local, max(1, ranks // local), torch.cuda.get_device_properties(0).total_memory)
    import psutil

    return Machine(0, ranks, psutil.virtual_memory().available // ranks)


def _resources(cfg: RunConfig, machine: Machine, loader: BatchLoader, steps: int) -> dict[str, str]:
    """Memory and disk, as ``kvds plan`` reckons them."""
    rows = measured_rows(cfg, loader, machine.ranks)
    plan = SeveralTeachersPlan(cfg, machine, rows) if cfg.teacher_names else RunPlan(cfg, machine, rows)
    sizes = [f"student {plan.student_size.total:,}", f"aligner {plan.aligner_parameters:,}"]
    if isinstance(plan, RunPlan) and plan.map_parameters:
        sizes.append(f"map of the handoff {plan.map_parameters:,}")
    teachers = " + ".join(f"{size.total:,}" for size in plan.teacher_sizes)
    sizes += [f"teacher{'s' if len(plan.teacher_sizes) > 1 else ''} {teachers}"] if teachers else []
    return {
        "models": f"{', '.join(sizes)} parameters",
        "memory": _memory(plan),
        "disk": _disk(cfg, plan, steps),
    }


def _memory(plan: RunPlan | SeveralTeachersPlan) -> str:
    machine = plan.machine
    usable = f"{_size(machine.usable)} usable per {'GPU' if machine.gpus else 'process'}"
    text = f"{_size(plan.peak)} at the peak, {usable}"
    if isinstance(plan, RunPlan) and plan.fits:
        phases = Phases(plan)
        for phase, remedy in phases.tight.items():
            peak = _size(phases.peaks[phase])
            raise InputError(f"batch_size={plan.cfg.batch_size}: {phase} takes {peak}, {usable}: {remedy}")
        return f"{_size(phases.peaks[phases.largest])} at the peak ({phases.largest}), {usable}"
    if not plan.fits:
        advice = ", ".join(plan.advice()) or "more ranks, or more memory"
        raise InputError(
            f"batch_size={plan.cfg.batch_size}: {text}; expected room for it (in the recipe: {advice}; for another "
            "machine: kvds plan)"
        )
    return text


def _disk(cfg: RunConfig, plan: RunPlan | SeveralTeachersPlan, steps: int) -> str:
    saved = 1 + ((steps - 1) // cfg.save_steps if cfg.save_steps else 0)
    # One more than are kept lies there while the newest is written.
    at_once = min(saved, cfg.keep_checkpoints + 1) if cfg.keep_checkpoints else saved
    needed = at_once * plan.checkpoint + plan.element * plan.student_size.total
    free = shutil.disk_usage(existing_parent(Path(cfg.output_dir))).free
    text = (
        f"{_size(needed)} for the student and {at_once} × {_size(plan.checkpoint)} of checkpoints, {_size(free)} free"
    )
    if needed > free:
        raise InputError(
            f"output_dir={cfg.output_dir}: {text}; expected room for them (--keep_checkpoints 2, a larger "
            "--save_steps, or another --output_dir)"
        )
    return text


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
