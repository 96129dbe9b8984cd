"""A model's configuration with its overrides, checked before any weights are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from kvds.config import RunConfig
from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.values import parse_overrides
from kvds.errors import InputError, one_line
from kvds.kv import KVShape
from kvds.kv.families import FAMILIES, decoder_layers
from kvds.models.family_check import check_family, check_losses, keeps_samples_apart
from kvds.models.generation import check_generation
from kvds.models.hub import folder_at_hand, from_hub
from kvds.models.tokenizer import check_vocabulary
from kvds.models.weight_check import check_weights
from kvds.models.weight_files import ADAPTER_FILE, adapter_fault

# Overriding the left side makes the right side stale: it is dropped, so that the family's own default is computed anew.
_DERIVED_KEYS = {
    "num_hidden_layers": ("layer_types", "no_rope_layers"),
    "hidden_size": ("head_dim",),
    "num_attention_heads": ("head_dim",),
}
_SIZES = {
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "n_layer", "n_embd", "n_head", "n_positions"),
}


def load_config(name: str, overrides: str = "", *, flag: str, option: str = "") -> PreTrainedConfig:
    """The architecture of ``name``, with ``overrides`` such as ``"num_hidden_layers=4,hidden_size=128"`` applied.

    Args:
        name: Folder or hub name.
        overrides: Changes of its settings.
        flag: ``"teacher"``, ``"student"`` or ``"model"``, for messages.
        option: What names it on the command line; unset: ``--FLAG_name``.

    Raises:
        InputError: nothing there, an unknown key, or a value of another type than the configuration's.
    """
    if os.path.isfile(os.path.join(name, ADAPTER_FILE)) and not os.path.isfile(os.path.join(name, "config.json")):
        raise InputError(f"{option or f'--{flag}_name'}={name}: {adapter_fault(Path(name))}")
    config = from_hub(AutoConfig, name, "config.json", option or f"--{flag}_name")
    if (folder := folder_at_hand(name)) is not None:
        check_generation(folder, f"{option or f'--{flag}_name'}={name}")
    changes = parse_overrides(overrides)
    if not changes:
        _check_sizes(config, f"{option or f'--{flag}_name'}={name}")
        return config
    values = config.to_dict()
    # transformers keeps what config.json calls rope_theta in a mapping of its own.
    rope = values.get("rope_parameters") or {}
    rope = dict(rope) if all(not isinstance(value, dict) for value in rope.values()) else {}
    known = set(values) | set(type(config).attribute_map) | set(rope)
    if hasattr(config, "num_key_value_heads"):
        known.add("head_dim")  # these families read it where it is given, though not all configurations declare it
    for key, value in changes.items():
        place = f"--{flag}_config_overrides {key}={value}"
        if key not in known:
            raise InputError(f"{place}: {config.model_type} has no such setting; expected one of its config.json keys")
        if key == "model_type":
            raise InputError(f"{place}: the family cannot be changed; expected another --{flag}_name")
        current = getattr(config, key, None)
        if key in rope:
            current = rope[key]
        if (
            current is not None
            and not isinstance(value, type(current))
            and not (isinstance(current, float) and isinstance(value, int))
            or (isinstance(value, bool) and not isinstance(current, bool | None))
        ):
            raise InputError(f"{place}: expected {type(current).__name__} as in {name}, got {type(value).__name__}")
        if isinstance(current, float):
            changes[key] = float(value)
        for stale in _DERIVED_KEYS.get(key, ()):
            if stale not in changes:
                values.pop(stale, None)
    own = {type(config).attribute_map.get(key, key): value for key, value in changes.items() if key not in rope}
    values.update(own)
    if rope:
        values["rope_parameters"] = rope | {key: value for key, value in changes.items() if key in rope}
    for key, value in changes.items():
        if key in _SIZES and value < 1:
            raise InputError(f"--{flag}_config_overrides {key}={value}: expected a whole number, at least 1")
    try:
        changed = type(config).from_dict(values)
    except Exception as error:  # transformers checks a configuration with a dozen kinds of exception
        reason = one_line(error)
        raise InputError(
            f"--{flag}_config_overrides {overrides}: {reason}; expected values that fit together"
        ) from error
    _check_sizes(changed, f"--{flag}_config_overrides {overrides}")
    return changed


def _check_sizes(config: PreTrainedConfig, place: str) -> None:
    """Refuse shapes that transformers builds and then cannot run, of the families that are known."""
    if config.model_type not in FAMILIES:
        return  # the families are told where one is needed
    for key in sorted(_SIZES):
        value = getattr(config, key, None)
        if value is not None and value < 1:
            raise InputError(f"{place}: {key} is {value}; expected a whole number, at least 1 (in config.json)")
    width, heads = config.hidden_size, config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % groups:
        raise InputError(f"{place}: {heads} attention heads over {groups} key-value heads; expected a multiple")
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and width % heads:
        raise InputError(f"{place}: hidden_size {width} over {heads} heads; expected hidden_size to be a multiple")
    if getattr(config, "rope_parameters", None) and (head_dim or width // heads) % 2:
        raise InputError(f"{place}: {head_dim or width // heads} numbers per head; expected an even count to rotate")


def check_positions(config: PreTrainedConfig, max_length: int, *, flag: str) -> None:
    """Refuse rows longer than the model has positions for, or than its rotation stays one and the same for."""
    rope = getattr(config, "rope_parameters", None) or {}
    same_until = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    if same_until is not None and max_length > same_until:
        raise InputError(
            f"max_length={max_length}: the {flag}'s rotation (longrope) changes for all rows of a batch where one has "
            f"more than {same_until} tokens; expected --max_length {same_until} or less"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise InputError(
            f"max_length={max_length}: the {flag} has {limit} positions; expected --max_length {limit} or less"
        )


def row_length(config: PreTrainedConfig, asked: int | None, default: int) -> int:
    """Tokens per row for a model by itself: as many as asked for, or the default, if it has the positions.

    Raises:
        InputError: more than its positions are asked for.
    """
    if asked is None:
        return min(default, getattr(config, "max_position_embeddings", None) or default)
    check_positions(config, asked, flag="model")
    return asked


def check_buildable(name: str, config: PreTrainedConfig, *, flag: str) -> nn.Module:
    """The model on the meta device, which takes neither memory nor weights: what transformers makes no model of is told
    before any weights are read.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            f"--{flag}_name={name}: model_type={config.model_type} is no causal language model of transformers; "
            f"expected one, such as {', '.join(sorted(FAMILIES))}"
        )
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # an activation that nobody knows is a KeyError, a bad padding id an AssertionError …
        raise InputError(
            f"--{flag}_name={name}: no model can be built from its configuration ({one_line(error)}); expected a "
            f"config.json that fits (see --{flag}_config_overrides)"
        ) from error
    return model


class ModelConfigs(NamedTuple):
    """The architectures of a run: the student's, and the teachers' in the order of ``cfg.all_teachers``, of whom there
    are none where no loss reads them.
    """

    student: PreTrainedConfig
    teachers: list[PreTrainedConfig]


def load_model_configs(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> ModelConfigs:
    """The architectures of a run's models, checked against the run and the headers of their weight files.

    Args:
        cfg: The run.
        tokenizer: Of the run.

    Raises:
        InputError: no such model, or one that this run cannot use.
    """
    teachers = cfg.all_teachers if cfg.uses_teacher else ()
    student = load_model_config(cfg, tokenizer, cfg.student, flag="student")
    configs = ModelConfigs(student, [load_model_config(cfg, tokenizer, name, flag="teacher") for name in teachers])
    for setting in ("packing", "tokens_per_batch"):
        if (value := getattr(cfg, setting)) and (reason := forbids_shared_rows(cfg, [student, *configs.teachers])):
            remedy = "--no_packing" if setting == "packing" else "--tokens_per_batch 0"
            raise InputError(f"{setting}={value}: {reason}; expected {remedy}")
    return configs


def forbids_shared_rows(cfg: RunConfig, configs: Sequence[PreTrainedConfig]) -> str:
    """Why samples need rows of their own in one of the models of ``configs``; empty where none needs them."""
    for config in configs:
        # By masks samples are told apart in the families that tests know, by bounds in those that were tried.
        if config.model_type not in FAMILIES and cfg.attn_implementation != "sdpa":
            return f"{config.model_type} tells samples of one row apart under --attn_implementation sdpa alone"
        if not keeps_samples_apart(config):
            return f"{config.model_type} does not tell samples of one row apart"
    return ""


def load_model_config(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, name: str, *, flag: str) -> PreTrainedConfig:
    """One of them; ``flag`` is ``"student"`` or ``"teacher"``."""
    config = load_config(name, getattr(cfg, f"{flag}_config_overrides"), flag=flag)
    model = check_buildable(name, config, flag=flag)
    check_losses(config, f"--{flag}_name={name}")
    if cfg.uses_kv:
        KVShape.from_config(config)  # refuses layers that differ
        decoder_layers(model)
    if cfg.uses_kv and ALIGNMENT_MODES[cfg.alignment_mode].teacher_reads != "hidden":
        check_family(config, f"--{flag}_name={name}")
    check_vocabulary(config, tokenizer, flag=flag)
    check_positions(config, cfg.max_length, flag=flag)
    cached = flag == "teacher" and cfg.teacher_cache is not None  # nobody reads its weights
    if getattr(cfg, f"{flag}_init") == "pretrained" and not cached and (folder := folder_at_hand(name)) is not None:
        check_weights(folder, config, f"--{flag}_name={name}", remedy=f"or --{flag}_init random")
    return config
