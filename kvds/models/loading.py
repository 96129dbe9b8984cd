"""Teacher and student from a hub name, a folder or a configuration alone, and the checks that they fit each other."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvds.errors import InputError, one_line
from kvds.models.family_check import attention_of
from kvds.models.generation import source_generation
from kvds.models.hub import from_hub, model_folder
from kvds.models.weight_check import check_finite, check_weights

log = logging.getLogger("kvds")
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    dtype: torch.dtype | Literal["auto"],
    attn_implementation: str | None,
    seed: int,
    flag: str,
    option: str = "",
    engine_config: dict[str, Any] | None = None,
    quantization: Any = None,
) -> nn.Module:
    """A causal language model in ``dtype``.

    With ``"sdpa"`` its attention takes samples by their bounds, too (:mod:`kvds.kv.row_attention`).

    Args:
        name: Folder or hub name (read only where ``init`` is ``"pretrained"``).
        config: Its architecture, overrides applied.
        init: ``"pretrained"`` or ``"random"`` (the same weights on every rank and for every world size, from ``seed``).
        dtype: Of the parameters; ``"auto"``: that of the files.
        attn_implementation: ``"sdpa"`` or ``"eager"``; None: plain attention as transformers chooses it.
        seed: Of the random start.
        flag: ``"teacher"``, ``"student"`` or ``"model"``, for messages.
        option: What names it on the command line; unset: ``--FLAG_name``.
        engine_config: The DeepSpeed configuration under which pretrained weights are loaded in shards (stage 3), or
            None.
        quantization: From :func:`kvds.models.quantized.quantization_config`, for pretrained weights; None: as they are.

    Raises:
        InputError: its weights are not those of the configuration, see :func:`kvds.models.weight_check.check_weights`.
    """
    attention = None if attn_implementation is None else attention_of(config, attn_implementation)
    if init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
            except (KeyError, ValueError) as error:
                raise InputError(
                    f"--{flag}_name={name}: no model can be built from its configuration ({one_line(error)}); expected "
                    f"a config.json that fits (see --{flag}_config_overrides)"
                ) from error
        model.generation_config = source_generation(name) or model.generation_config
        return model
    place = option or f"--{flag}_name"
    folder = model_folder(name, place)
    remedy = "" if flag == "model" else f"or --{flag}_init random"  # a command without such a flag
    check_weights(folder, config, f"{place}={name}", remedy=remedy)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of a node's ranks one; what it finds ends all
        check_finite(folder, f"{place}={name}", remedy=remedy)
    quantized = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": "cuda"}}
    with _partitioned_loading(engine_config):
        return from_hub(
            AutoModelForCausalLM, str(folder), "model with weights", place,
            config=config, dtype=dtype, attn_implementation=attention, use_safetensors=True, **quantized,
        )  # fmt: skip
