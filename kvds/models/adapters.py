"""LoRA adapters on a student, through peft: put in, held against what a loss needs of them, merged and written.

The adapters are put into the model in place: it stays a model of transformers, whose projections captures read as ever.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2022).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kvds.config import RunConfig
from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.extras import need
from kvds.errors import InputError, one_line
from kvds.kv.families import attention_layouts, decoder_layers
from kvds.models.weight_files import ADAPTER_FILE

ADAPTER_FOLDER = "adapter"
"""Beside a run's student: the adapters alone, for ``peft.PeftModel.from_pretrained``."""
_NO_IDENTITY = ("base_model_name_or_path", "revision", "peft_version", "inference_mode")
_NAME = "default"  # peft's, of adapters that nobody named


def adapter_config(cfg: RunConfig) -> Any:
    """peft's configuration of a run's adapters; None where the whole student is trained.

    Raises:
        InputError: no peft, or a file that it makes no LoRA of.
    """
    if not cfg.uses_adapters:
        return None
    place = f"lora_r={cfg.lora_r}" if cfg.lora_config is None else f"lora_config={cfg.lora_config}"
    need(place, "peft")
    from peft import LoraConfig, PeftConfig

    if cfg.lora_config is None:
        targets = list(cfg.lora_target_modules)
        return LoraConfig(
            r=cfg.lora_r or 0, lora_alpha=2 * (cfg.lora_r or 0) if cfg.lora_alpha is None else cfg.lora_alpha,
            lora_dropout=cfg.lora_dropout, target_modules=targets[0] if targets == ["all-linear"] else targets,
            task_type="CAUSAL_LM", base_model_name_or_path=cfg.student,
        )  # fmt: skip
    file = Path(cfg.lora_config)
    try:
        found = PeftConfig.from_json_file(str(file / ADAPTER_FILE if file.is_dir() else file))
        config = PeftConfig.from_peft_type(**found)
    except Exception as error:  # JSON, types and validators of peft's own
        raise InputError(f"{place}: peft does not read it ({one_line(error)}); expected its {ADAPTER_FILE}") from error
    if not isinstance(config, LoraConfig) or config.modules_to_save or config.bias != "none":
        raise InputError(f"{place}: expected a LoRA without modules_to_save and biases, so that adapters alone train")
    config.base_model_name_or_path, config.inference_mode = cfg.student, False
    return config


def adapter_identity(config: Any) -> str:
    """All that a configuration says but where its model lies and which peft wrote it."""
    told = {name: value for name, value in config.to_dict().items() if name not in _NO_IDENTITY}
    return json.dumps(told, sort_keys=True, default=sorted)


def add_adapters(model: nn.Module, config: Any, *, seed: int) -> None:
    """Put adapters into ``model``, in place: from here on they alone train.

    Args:
        model: A causal language model, whole or in ZeRO-3's shards.
        config: From :func:`adapter_config`.
        seed: Of the adapters' random halves, the same on every rank.

    Raises:
        InputError: peft finds no module to adapt.
    """
    from peft import inject_adapter_in_model

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, _NAME)
    except ValueError as error:
        raise InputError(
            f"lora_target_modules={_listed(config.target_modules)}: {one_line(error)}; expected names of the student's "
            "projections, such as q_proj k_proj v_proj (or all-linear)"
        ) from error


def check_adapted(model: nn.Module, cfg: RunConfig) -> None:
    """Refuse adapters of which the KV loss's gradient reaches none in the first layer, whose input nothing trains.

    Raises:
        InputError: naming the projection without one.
    """
    if not cfg.uses_kv:
        return
    config = adapters_of(model)
    if ALIGNMENT_MODES[cfg.alignment_mode].reads == "hidden":
        missing = [] if _trains(decoder_layers(model)[0]) else ["layer"]
    else:
        layout = attention_layouts(model)[0]
        missing = [part for part in ("key", "value") if not _trains(getattr(layout, part).projection)]
    if missing:
        raise InputError(
            f"lora_target_modules={_listed(config.target_modules)}: the {' and '.join(missing)} projection of the "
            "first layer has no adapter, so that the KV loss trains nothing there; expected it among them (or "
            "all-linear)"
        )


def adapters_of(model: nn.Module) -> Any:
    """peft's configuration of the adapters in ``model``; None without any."""
    return getattr(model, "peft_config", {}).get(_NAME)


def merge_adapters(model: nn.Module, config: Any, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Load the weights of an adapted model into a plain one, each adapter added to what it adapts.

    Args:
        model: Plain, of the same architecture; afterwards plain again.
        config: Of the adapters.
        state: Gathered weights of the adapted model.

    Returns:
        Names that were missing and unexpected, as of ``load_state_dict``.
    """
    from peft import get_peft_model

    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)  # puts them into ``model``
    found = model.load_state_dict(state, strict=False)
    adapted.merge_and_unload()
    vars(model).pop("peft_config", None)
    return list(found.missing_keys), list(found.unexpected_keys)


def save_adapters(config: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained`` puts onto the student that the run began with.

    Args:
        config: Of the adapters.
        state: Gathered weights, of which those of adapters are taken.
        folder: To write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor.contiguous()
        for name, tensor in state.items() if ".lora_" in name
    }  # fmt: skip
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def read_adapters(folder: Path) -> Any:
    """The configuration that :meth:`save_pretrained` of it wrote into ``folder``; None without one."""
    if not (folder / ADAPTER_FILE).is_file():
        return None
    need(f"{folder / ADAPTER_FILE}", "peft")
    from peft import PeftConfig

    return PeftConfig.from_pretrained(str(folder))


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _listed(targets: Any) -> str:
    return targets if isinstance(targets, str) else " ".join(sorted(targets))
