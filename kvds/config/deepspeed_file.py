"""DeepSpeed's JSON: read, checked against the flags, completed for the student's and the teacher's engine.

DeepSpeed drops unknown keys and "auto" without a word, and clips at norm 1.0 where the file says nothing. Here a key
that would not do what it says is an error, and what the engines get is explicit. Nothing of DeepSpeed is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvds.config.deepspeed_keys import MONITOR_PACKAGES, NESTED, REFUSED, TOP_LEVEL, ZERO, check_keys
from kvds.config.shipped_files import DEEPSPEED_CONFIGS, find_shipped, shipped_hint
from kvds.errors import InputError


def load_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration file and refuse what kvds cannot honour.

    Raises:
        InputError: no such file, not a JSON object, an ``"auto"`` value, an optimizer or scheduler section, fp16, a key
            that DeepSpeed would ignore, refuse or read as another type, a feature that a run cannot honour.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError(
                f"deepspeed_config={path}: {twice[0]} stands there twice; expected each key once (remove one)"
            )
        return dict(pairs)

    try:
        raw = json.loads(find_shipped(path, DEEPSPEED_CONFIGS).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise InputError(
            f"deepspeed_config={path}: {error.strerror}; expected a file{shipped_hint(path, DEEPSPEED_CONFIGS)}"
        ) from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"deepspeed_config={path}: not JSON ({error}); expected an object such as in ds_configs/zero3.json"
        ) from error
    if not isinstance(raw, dict):
        raise InputError(
            f"deepspeed_config={path}: holds a {type(raw).__name__}; expected a JSON object as in ds_configs/zero3.json"
        )
    for place, value in _walk(raw):
        if value == "auto":
            raise InputError(
                f'deepspeed_config={path}: {place}="auto" is a placeholder of the transformers Trainer that DeepSpeed '
                f"drops silently; expected a number (ds_configs/ has some)"
            )
    for section in ("optimizer", "scheduler"):
        if section in raw:
            raise InputError(
                f"deepspeed_config={path}: has a section {section!r}, which the flags --optimizer, --lr and "
                f"--lr_scheduler_type set and which the teacher's engine must not have; expected a file without it"
            )
    for section, reason in REFUSED.items():
        if section in raw:
            raise InputError(f"deepspeed_config={path}: has {section}, but {reason}; expected a file without it")
    check_keys(raw, TOP_LEVEL, place=f"deepspeed_config={path}")
    if _enabled(raw, "fp16"):
        raise InputError(f"deepspeed_config={path}: fp16 is on; expected bf16 or neither (fp32): keys overflow in fp16")
    if _enabled(raw, "torch_autocast"):
        raise InputError(
            f"deepspeed_config={path}: torch_autocast is on; expected bf16 or neither (fp32): keys and values of "
            f"teacher and student must have one dtype"
        )
    if raw.get("gradient_allreduce_op", "mean") != "mean" or not raw.get("managed_gradient_accumulation", True):
        raise InputError(
            f"deepspeed_config={path}: gradient_allreduce_op or managed_gradient_accumulation is changed, and losses "
            f"would no longer be means over ranks and micro-batches; expected a file without them"
        )
    zero = raw.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise InputError(
            f"deepspeed_config={path}: zero_optimization.stage is missing or unknown; expected 3 (or 0, 1, 2)"
        )
    check_keys(zero, ZERO, place=f"deepspeed_config={path}", prefix="zero_optimization.")
    for name, known in NESTED.items():
        parent, _, child = name.rpartition(".")
        section = (raw[parent] if parent else raw).get(child, {})
        check_keys(section, known, place=f"deepspeed_config={path}", prefix=f"{name}.")
    for name, package in MONITOR_PACKAGES.items():
        if _enabled(raw, name) and importlib.util.find_spec(package) is None:
            raise InputError(
                f"deepspeed_config={path}: {name} is on, but the package {package} is not installed; expected it (pip "
                f"install {package}), or no {name} in the file"
            )
    for name in ("offload_param", "offload_optimizer"):
        section = zero.get(name, {})
        device = section.get("device", "none")
        if device == "nvme" and not os.path.isdir(section.get("nvme_path", "")):
            raise InputError(
                f"deepspeed_config={path}: {name}.nvme_path={json.dumps(section.get('nvme_path'))}: expected a folder "
                "that is there, on an NVMe disk (or device cpu)"
            )
        if device != "none" and name == "offload_param" and zero["stage"] != 3:
            raise InputError(
                f"deepspeed_config={path}: offload_param with stage {zero['stage']}, which shards no parameters; "
                f"expected stage 3 (or no offload_param)"
            )
    return raw


def _walk(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        name = f"{place}.{key}" if place else str(key)
        yield name, value
        yield from _walk(value, name)


def _enabled(raw: dict[str, Any], section: str) -> bool:
    return isinstance(raw.get(section), dict) and bool(raw[section].get("enabled", False))


def compute_dtype(raw: dict[str, Any]) -> str:
    """``"bf16"`` where the configuration turns it on, else ``"fp32"``."""
    return "bf16" if _enabled(raw, "bf16") else "fp32"
