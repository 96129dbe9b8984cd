"""Whole weights out of shards: a plain student to evaluate, generate with and export."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from kvds.align import aligner_config_dict
from kvds.checkpoint.aligner_file import ALIGNER_FILE, save_aligner
from kvds.checkpoint.folder import CHECKPOINTS, latest_step, saved_steps, step_tag
from kvds.checkpoint.manifest import folder_faults
from kvds.checkpoint.model_card import recorded_results, write_model_card
from kvds.checkpoint.origin import read_origin
from kvds.config.recipe import load_recipe
from kvds.durable_files import UNFINISHED, put_in_place
from kvds.errors import InputError, one_line
from kvds.kv.row_attention import plain_attention
from kvds.models.adapters import ADAPTER_FOLDER, adapters_of, merge_adapters, read_adapters, save_adapters
from kvds.models.generation import GENERATION_FILE, fit_generation, source_generation
from kvds.models.weight_files import ADAPTER_FILE

STUDENT_FOLDER = "student"


def gather_parameters(module: nn.Module, *, keep: bool, trained: bool = False) -> dict[str, Tensor]:
    """Whole CPU copies of a module's parameters and persistent buffers, one name per shared tensor; all ranks call it.

    Args:
        module: Part of the engine's module; its parameters may be sharded by ZeRO-3.
        keep: Whether this rank wants the copies (the others only take part in gathering).
        trained: Parameters that train alone, and no buffers.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if trained and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if keep:
                state[name] = parameter.detach().cpu().clone()
    if keep and not trained:
        transient = {
            f"{prefix}.{name}" if prefix else name
            for prefix, child in module.named_modules()
            for name in child._non_persistent_buffers_set
        }
        state |= {name: b.detach().cpu().clone() for name, b in module.named_buffers() if name not in transient}
    return state


def plain_architecture(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """A transformers model of its own with random weights, which draws nothing from the run's random state.

    Args:
        config: The student's, which keeps its own settings.
        dtype: Of the weights.
    """
    config = copy.deepcopy(config)
    attention = plain_attention(config._attn_implementation)
    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def plain_student(
    config: PreTrainedConfig,
    state: dict[str, Tensor],
    generation: GenerationConfig | None = None,
    *,
    adapters: Any = None,
) -> nn.Module:
    """A transformers model of its own with the gathered weights: for evaluation, generation and export.

    Args:
        config: The student's.
        state: Its weights.
        generation: Of the model that it was made of; None: what ``config`` alone says.
        adapters: Configuration of adapters among the weights, which are merged; None without any.
    """
    model = plain_architecture(config, next(iter(state.values())).dtype)
    if generation is not None:
        model.generation_config = copy.deepcopy(generation)
    if adapters is None:
        missing, unexpected = model.load_state_dict(state, strict=False)
    else:
        missing, unexpected = merge_adapters(model, adapters, state)
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


def save_student(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, *, max_new_tokens: int | None = None
) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load, and
    whose plain ``generate()`` ends where an evaluation ends.

    Args:
        model: The student; its generation settings become those of the folder.
        tokenizer: Of its rows.
        folder: To write.
        max_new_tokens: See :func:`kvds.models.generation.fit_generation`.
    """
    unfinished = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    generation = fit_generation(model, tokenizer, max_new_tokens)
    model.generation_config = GenerationConfig()  # transformers refuses to save what some published files say
    model.save_pretrained(unfinished)  # type: ignore[operator]
    model.generation_config = generation
    tokenizer.save_pretrained(unfinished)
    _write_generation(generation, unfinished)
    put_in_place(unfinished, folder)


def _write_generation(generation: GenerationConfig, folder: Path) -> None:
    generation.to_json_file(folder / GENERATION_FILE, use_diff=True, keys_to_pop=["compile_config"])


def export_checkpoint(run_dir: str | Path, step: int | None, output: str | Path) -> Path:
    """Turn a DeepSpeed checkpoint of a run into a plain ``student/`` and ``map_aligner.pt`` under ``output``, and where
    adapters were trained ``adapter/``; one process.

    Args:
        run_dir: The run's ``--output_dir``.
        step: Which checkpoint; None = the latest.
        output: Folder to write.

    Returns:
        ``output``.

    Raises:
        InputError: no such run or checkpoint.
    """
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
    state = _whole_weights(run_dir, step)
    config = AutoConfig.from_pretrained(plan)
    dtype = config.dtype or torch.float32
    student = {k.removeprefix("student."): v.to(dtype) for k, v in state.items() if k.startswith("student.")}
    output.mkdir(parents=True, exist_ok=True)
    settings = run_dir / "config.yaml"
    adapters = read_adapters(plan)
    if adapters is not None:
        save_adapters(adapters, student, output / ADAPTER_FOLDER)
    student = _without_tied_copies(config, student)
    save_student(
        plain_student(config, student, source_generation(str(plan.absolute())), adapters=adapters),
        AutoTokenizer.from_pretrained(plan),
        output / STUDENT_FOLDER,
        max_new_tokens=load_recipe(settings).get("max_new_tokens") if settings.is_file() else None,
    )
    if settings.is_file():
        write_model_card(run_dir, output / STUDENT_FOLDER, step, recorded_results(run_dir, step))
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


def _whole_weights(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Weights and buffers of a checkpoint whose manifest has been checked, put together from all shards."""
    folder = run_dir / CHECKPOINTS
    if read_origin(run_dir, step).zero_stage == 0:  # they lie there whole
        file = folder / step_tag(step) / "mp_rank_00_model_states.pt"
        return torch.load(file, map_location="cpu", weights_only=False)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=step_tag(step))


def _without_tied_copies(config: PreTrainedConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    tied = config.get_text_config().tie_word_embeddings
    return {k: v for k, v in state.items() if not (tied and k == "lm_head.weight")}


def save_architecture(run_dir: Path, student: Any, tokenizer: PreTrainedTokenizerBase, aligner: Any) -> None:
    """Write beside the checkpoints what turning one into a plain model takes: configuration, the source's generation
    settings, tokenizer, aligner configuration.
    """
    folder = run_dir / CHECKPOINTS / "model"
    student.config.save_pretrained(folder)
    (folder / GENERATION_FILE).unlink(missing_ok=True)
    if not student.generation_config._from_model_config:
        _write_generation(student.generation_config, folder)
    tokenizer.save_pretrained(folder)
    (folder / ADAPTER_FILE).unlink(missing_ok=True)
    if (adapters := adapters_of(student)) is not None:
        adapters.save_pretrained(folder)
    if aligner is not None:
        with (folder / "aligner.pt").open("wb") as file:
            torch.save(aligner_config_dict(aligner), file)
