"""Teacher and student from a hub name, a folder or a configuration alone, and the checks that they fit each other."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from kvds.config import RunConfig, parse_overrides
from kvds.config_values import one_line
from kvds.errors import InputError
from kvds.kv import KVShape
from kvds.kv.families import FAMILIES

log = logging.getLogger("kvds")

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Overriding the left side makes the right side stale: it is dropped, so that the family's own default is computed anew.
_DERIVED_KEYS = {
    "num_hidden_layers": ("layer_types",),
    "hidden_size": ("head_dim",),
    "num_attention_heads": ("head_dim",),
}

_SIZES = {
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "n_layer", "n_embd", "n_head", "n_positions"),
}


def _is_folder_name(name: str) -> bool:
    return os.path.exists(name) or name.startswith((".", "/", "~"))


def _from_hub(loader: Any, name: str, what: str, flag: str, **kwargs: Any) -> Any:
    """``loader.from_pretrained`` with failures told in the user's terms. Remote code is never run."""
    if _is_folder_name(name) and not os.path.isdir(name):
        raise InputError(f"{flag}={name}: no such folder; expected a local folder with a {what}, or a hub name")
    try:
        return loader.from_pretrained(name, trust_remote_code=False, **kwargs)
    except RuntimeError as error:
        if isinstance(error, RecursionError):
            raise InputError(
                f"{flag}={name}: its {what} nests too deep; expected what save_pretrained writes"
            ) from error
        raise  # shapes that do not fit, or no memory: the caller knows what that means
    except Exception as error:  # each reader of a damaged file raises another kind
        reason = one_line(error)
        if _is_folder_name(name):
            raise InputError(
                f"{flag}={name}: the folder holds no loadable {what} ({reason}); expected the files that "
                f"save_pretrained writes"
            ) from error
        raise InputError(
            f"{flag}={name}: the {what} could not be loaded from the hub or its local cache ({reason}); without "
            f"internet, bring it where there is some (`kvds prefetch RECIPE --to DIR`, or `hf download {name} "
            "--local-dir FOLDER` and give the folder in place of the name)"
        ) from error


def load_config(name: str, overrides: str = "", *, flag: str) -> PreTrainedConfig:
    """The architecture of ``name``, with ``overrides`` such as ``"num_hidden_layers=4,hidden_size=128"`` applied.

    Raises:
        InputError: nothing there, an unknown key, or a value of another type than the configuration's.
    """
    config = _from_hub(AutoConfig, name, "config.json", f"--{flag}_name")
    changes = parse_overrides(overrides)
    if not changes:
        _check_sizes(config, f"--{flag}_name={name}")
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


def _tokenizer(name: str, flag: str) -> PreTrainedTokenizerBase:
    tokenizer = _from_hub(AutoTokenizer, name, "tokenizer", flag)
    # From a config.json alone transformers makes a tokenizer that knows its special tokens and not one word.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise InputError(
            f"{flag}={name}: holds no tokenizer; expected tokenizer.json there, or --tokenizer_name FOLDER"
        )
    return tokenizer


def load_tokenizer(cfg: RunConfig) -> PreTrainedTokenizerBase:
    """The one tokenizer of a run: ``--tokenizer_name``, else the teacher's, else the student's."""
    if cfg.tokenizer_name is not None:
        return _tokenizer(cfg.tokenizer_name, "--tokenizer_name")
    names = [name for name in ((cfg.teacher if cfg.uses_teacher else None), cfg.student) if name is not None]
    for position, name in enumerate(dict.fromkeys(names)):
        try:
            return _tokenizer(name, "--teacher_name" if position == 0 else "--student_name")
        except InputError:
            if position == len(set(names)) - 1:
                raise InputError(
                    f"--tokenizer_name is not given and {' and '.join(dict.fromkeys(names))} hold no tokenizer; "
                    f"expected --tokenizer_name FOLDER"
                ) from None
    raise InputError("--model_name or --student_name is missing; expected a folder or a hub name")


def check_same_tokenizer(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Positions correspond one to one only where both models read the same ids: refuse models that bring other
    vocabularies.
    """
    flag_of_teacher = "--teacher_names" if cfg.teacher_names else "--teacher_name"
    teachers = [(flag_of_teacher, name) for name in cfg.teachers] if cfg.uses_teacher else []
    for flag, name in (*teachers, ("--student_name", cfg.student)):
        if name is None or not Path(name).is_dir() or not any(Path(name).glob("tokenizer*")):
            continue
        own = _tokenizer(name, flag)
        if own.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"{flag}={name}: its tokenizer ({len(own)} entries) differs from the run's ({len(tokenizer)} "
                "entries); expected teacher and student of one vocabulary, since keys and values are matched "
                "position by position"
            )


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, *, flag: str) -> None:
    """A model may pad its vocabulary, but must have a row for each token."""
    rows, largest = int(config.vocab_size), max(tokenizer.get_vocab().values())
    if rows <= largest:
        raise InputError(
            f"--{flag}_name: vocab_size {rows} has no row for token id {largest} of the tokenizer; expected vocab_size "
            f"> {largest} (another --tokenizer_name, or --{flag}_config_overrides vocab_size={largest + 1} with "
            f"--{flag}_init random)"
        )


def check_positions(config: PreTrainedConfig, max_length: int, *, flag: str) -> None:
    """Refuse rows longer than the model has positions for."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise InputError(
            f"max_length={max_length}: the {flag} has {limit} positions; expected --max_length {limit} or less"
        )


def check_buildable(name: str, config: PreTrainedConfig, *, flag: str) -> None:
    """Build the model on the meta device, which takes neither memory nor weights: what transformers makes no model of
    is told before any weights are read.
    """
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception as error:  # an activation that nobody knows is a KeyError, a bad padding id an AssertionError …
        raise InputError(
            f"--{flag}_name={name}: no model can be built from its configuration ({one_line(error)}); expected a "
            f"config.json that fits (see --{flag}_config_overrides)"
        ) from error


def kv_shape(config: PreTrainedConfig) -> KVShape:
    """Layer count, KV heads and head_dim as the configuration states them."""
    return KVShape.from_config(config)


def run_model_config(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, name: str, *, flag: str) -> PreTrainedConfig:
    """The architecture of a run's model, checked against the run: all that can be said without its weights.

    Args:
        cfg: The run.
        tokenizer: Of the run.
        name: Folder or hub name.
        flag: ``"teacher"`` or ``"student"``.

    Raises:
        InputError: no such model, or one that this run cannot use.
    """
    overrides = getattr(cfg, f"{flag}_config_overrides")
    if overrides and getattr(cfg, f"{flag}_init") == "pretrained":
        log.info("%s: configuration overrides on pretrained weights: their shapes must still fit", flag)
    config = load_config(name, overrides, flag=flag)
    kv_shape(config)
    check_vocabulary(config, tokenizer, flag=flag)
    check_positions(config, cfg.max_length, flag=flag)
    check_buildable(name, config, flag=flag)
    return config


@contextlib.contextmanager
def _partitioned_loading(engine_config: dict[str, Any] | None) -> Iterator[None]:
    """Within it, ``from_pretrained`` creates parameters sharded by ZeRO-3, so that no rank ever holds a whole model.

    transformers finds the DeepSpeed configuration through a global weak reference: it must live for the load and be
    gone before the next model, which may be placed otherwise.
    """
    if engine_config is None or engine_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig  # needs DeepSpeed, which a whole model does not

    reference = HfDeepSpeedConfig(engine_config)
    try:
        yield
    finally:
        del reference
        gc.collect()


def load_model(
    name: str,
    config: PreTrainedConfig,
    *,
    init: str,
    dtype: torch.dtype,
    attn_implementation: str,
    seed: int,
    flag: str,
    engine_config: dict[str, Any] | None = None,
) -> nn.Module:
    """A causal language model in ``dtype``.

    Args:
        name: Folder or hub name (read only where ``init`` is ``"pretrained"``).
        config: Its architecture, overrides applied.
        init: ``"pretrained"`` or ``"random"`` (the same weights on every rank and for every world size, from ``seed``).
        dtype: Of the parameters.
        attn_implementation: ``"sdpa"`` or ``"eager"``.
        seed: Of the random start.
        flag: ``"teacher"`` or ``"student"``, for messages.
        engine_config: The DeepSpeed configuration under which pretrained weights are loaded in shards (stage 3), or
            None.

    Raises:
        InputError: the weights are missing, or their shapes are not the configuration's.
    """
    if init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
            except (KeyError, ValueError) as error:
                raise InputError(
                    f"--{flag}_name={name}: no model can be built from its configuration ({one_line(error)}); expected "
                    f"a config.json that fits (see --{flag}_config_overrides)"
                ) from error
    with _partitioned_loading(engine_config):
        try:
            model, info = _from_hub(
                AutoModelForCausalLM, name, "model with weights", f"--{flag}_name",
                config=config, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True,
            )  # fmt: skip
        except RuntimeError as error:
            raise InputError(
                f"--{flag}_name={name}: its weights do not have the shapes of its configuration "
                f"({' '.join(str(error).split())[:200]}); expected matching files, or --{flag}_init random"
            ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"--{flag}_name={name}: {len(missing)} weights are missing (first: {missing[0]}); expected a whole "
            f"checkpoint, or --{flag}_init random"
        )
    return model


def backbone(model: nn.Module) -> nn.Module:
    """The transformer without its language-model head."""
    return getattr(model, str(model.base_model_prefix))
