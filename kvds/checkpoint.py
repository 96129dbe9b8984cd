"""What a run leaves on disk: DeepSpeed checkpoints to resume from, a plain student, and ``map_aligner.pt``."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from kvds.align import AlignerGroup, KVAligner, aligner_config_dict, aligner_from_config_dict
from kvds.checkpoint_folder import CHECKPOINTS, latest_step, resumable_steps, saved_steps, step_tag
from kvds.checkpoint_manifest import folder_faults
from kvds.config_values import one_line
from kvds.durable_files import UNFINISHED, put_in_place
from kvds.errors import InputError

log = logging.getLogger("kvds")

ALIGNER_FILE = "map_aligner.pt"
ALIGNER_START_FILE = "map_aligner_start.pt"
STUDENT_FOLDER = "student"


def choose_checkpoint(run_dir: Path) -> int | None:
    """The step of the checkpoint to go on from: the latest whole one; all ranks call it and read a share of the files.

    A checkpoint that is not as its manifest says is named in a warning and the one before is taken. Nothing is
    unpickled here, and nothing that fails here is unpickled later.

    Returns:
        The step, the same on all ranks, or None where the run has no checkpoint.

    Raises:
        InputError: there are checkpoints and none is whole, or ``latest`` names something else.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    steps = [resumable_steps(run_dir)]
    torch.distributed.broadcast_object_list(steps, src=0)  # all ranks try the same ones
    told = ""
    for step in steps[0]:
        mine = folder_faults(run_dir / CHECKPOINTS / step_tag(step), part=rank, parts=world)
        everyone: list[Any] = [None] * world
        torch.distributed.all_gather_object(everyone, mine)
        faults = [fault for of_rank in everyone for fault in of_rank]
        if not faults:
            return step
        fault = f"{run_dir / CHECKPOINTS / step_tag(step)}: not whole, {faults[0]}"
        log.warning("%s; the checkpoint before is taken", fault)
        told = told or fault
    if told:
        raise InputError(f"{told}, and none before it is whole; expected a whole checkpoint (or --resume never)")
    return None


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, run_dir: Path, step: int) -> dict[str, Any]:
    """Restore the engine from ``checkpoints/step-NNNNNN`` and return the ``state`` that was saved with it; all ranks
    call it.
    """
    world = saved_world_size(run_dir, step)
    if world != torch.distributed.get_world_size():
        raise InputError(
            f"--resume: {step_tag(step)} in {run_dir} was saved by {world} ranks; expected the same number, "
            f"got {torch.distributed.get_world_size()} (start {world} ranks, or --resume never with another "
            "--output_dir)"
        )
    path, client = engine.load_checkpoint(str(run_dir / CHECKPOINTS), tag=step_tag(step))
    if path is None:
        raise InputError(
            f"{run_dir / CHECKPOINTS / step_tag(step)}: DeepSpeed could not load it; expected a whole checkpoint"
        )
    return client["kvds"]


def saved_world_size(run_dir: Path, step: int) -> int:
    """How many ranks wrote the optimizer shards of a checkpoint."""
    return len(list((run_dir / CHECKPOINTS / step_tag(step)).glob("*_optim_states.pt")))


def gather_parameters(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Whole CPU copies of a module's parameters and persistent buffers, one name per shared tensor; all ranks call it.

    Args:
        module: Part of the engine's module; its parameters may be sharded by ZeRO-3.
        keep: Whether this rank wants the copies (the others only take part in gathering).
    """
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if keep:
                state[name] = parameter.detach().cpu().clone()
    if keep:
        transient = {
            f"{prefix}.{name}" if prefix else name
            for prefix, child in module.named_modules()
            for name in child._non_persistent_buffers_set
        }
        state |= {name: b.detach().cpu().clone() for name, b in module.named_buffers() if name not in transient}
    return state


def plain_student(config: PreTrainedConfig, state: dict[str, Tensor]) -> nn.Module:
    """A transformers model of its own with the gathered weights: for evaluation, generation and export."""
    dtype = next(iter(state.values())).dtype
    config = copy.deepcopy(config)  # the training model keeps its own
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = True  # training turns it off; who loads this model generates
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    tied = (
        set(getattr(model, "_tied_weights_keys", None) or {}) if config.get_text_config().tie_word_embeddings else set()
    )
    if unexpected or set(missing) - tied:
        raise RuntimeError(
            f"gathered weights do not fit the student: missing {sorted(set(missing) - tied)[:3]}, unexpected "
            f"{unexpected[:3]}"
        )
    return model.eval()


def save_student(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)  # type: ignore[operator]
    tokenizer.save_pretrained(unfinished)
    put_in_place(unfinished, folder)


def save_aligner(config: dict[str, Any], state: dict[str, Tensor], path: Path) -> None:
    """Write ``map_aligner.pt``: state dict and configuration, loadable with ``weights_only=True``."""
    unfinished = path.with_name(path.name + UNFINISHED)
    torch.save({"config": config, "state_dict": state}, unfinished)
    put_in_place(unfinished, path)


def load_aligner(path: str | Path) -> KVAligner | AlignerGroup:
    """The aligner of a ``map_aligner.pt``, on the CPU.

    Raises:
        InputError: no such file, or not one that kvds wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a map_aligner.pt of a finished run with an alignment")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        aligner = aligner_from_config_dict(content["config"])
        aligner.load_state_dict(content["state_dict"])
    except Exception as error:  # a damaged file can fail anywhere in torch's reader
        raise InputError(f"{path}: not an aligner that kvds saved ({' '.join(str(error).split())[:160]})") from error
    return aligner


def export_checkpoint(run_dir: str | Path, step: int | None, output: str | Path) -> Path:
    """Turn a DeepSpeed checkpoint of a run into a plain ``student/`` and ``map_aligner.pt`` under ``output``; one
    process.

    Args:
        run_dir: The run's ``--output_dir``.
        step: Which checkpoint; None = the latest.
        output: Folder to write.

    Returns:
        ``output``.

    Raises:
        InputError: no such run or checkpoint.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from transformers import AutoTokenizer

    run_dir, output = Path(run_dir), Path(output)
    if not run_dir.is_dir():
        raise InputError(f"--run {run_dir}: no such folder; expected the --output_dir of a run")
    step = latest_step(run_dir) if step is None else step
    folder = run_dir / CHECKPOINTS
    if step is None or not (folder / step_tag(step)).is_dir():
        found = [step_tag(saved) for saved in saved_steps(run_dir)]
        wanted = "no checkpoint" if step is None else f"no checkpoint {step_tag(step)}"
        raise InputError(f"--run {run_dir}: {wanted}; expected {', '.join(found) or 'a run that has saved one'}")
    # Before DeepSpeed unpickles it: what is damaged is named, and what nobody wrote is not read.
    faults = folder_faults(folder / step_tag(step))
    if faults:
        raise InputError(
            f"{folder / step_tag(step)}: not whole, {faults[0]}; expected the checkpoint as it was saved (or another "
            "--step)"
        )
    plan = folder / "model"
    aligner_config = _aligner_config(plan / "aligner.pt")
    if not (plan / "config.json").is_file():
        raise InputError(
            f"{plan}: the student's config.json is missing; expected the folder that training writes beside checkpoints"
        )
    state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=step_tag(step))
    config = AutoConfig.from_pretrained(plan)
    dtype = config.dtype or torch.float32
    student = {k.removeprefix("student."): v.to(dtype) for k, v in state.items() if k.startswith("student.")}
    output.mkdir(parents=True, exist_ok=True)
    save_student(
        plain_student(config, _without_tied_copies(config, student)),
        AutoTokenizer.from_pretrained(plan),
        output / STUDENT_FOLDER,
    )
    if aligner_config is not None:
        aligner = {k.removeprefix("aligner."): v for k, v in state.items() if k.startswith("aligner.")}
        save_aligner(aligner_config, aligner, output / ALIGNER_FILE)
    return output


def _aligner_config(path: Path) -> dict[str, Any] | None:
    """What :func:`save_architecture` wrote of the aligner; None where the run had none."""
    if not path.is_file():
        return None
    try:
        return dict(torch.load(path, weights_only=True))
    except Exception as error:  # a damaged file can fail anywhere in torch's reader
        raise InputError(
            f"{path}: not what kvds saved ({one_line(error)[:160]}); expected the file that training wrote there"
        ) from error


def _without_tied_copies(config: PreTrainedConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    tied = config.get_text_config().tie_word_embeddings
    return {k: v for k, v in state.items() if not (tied and k == "lm_head.weight")}


def save_architecture(
    run_dir: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, aligner: Any
) -> None:
    """Write beside the checkpoints what turning one into a plain model takes: configuration, tokenizer, aligner
    configuration.
    """
    folder = run_dir / CHECKPOINTS / "model"
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if aligner is not None:
        torch.save(aligner_config_dict(aligner), folder / "aligner.pt")
