"""Weights in 8 or 4 bits, through bitsandbytes: for a model that only runs, on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from kvds.config import RunConfig
from kvds.config.extras import need
from kvds.errors import InputError

BITS = {"8bit": 8, "4bit": 4}


def check_quantizable(cfg: RunConfig, device: torch.device) -> None:
    """Refuse a teacher in 8 or 4 bits where nothing runs it, before any weights are read.

    Raises:
        InputError: no GPU, or no bitsandbytes.
    """
    if cfg.teacher_quantization not in BITS:
        return
    place = f"teacher_quantization={cfg.teacher_quantization}"
    if device.type != "cuda":
        raise InputError(f"{place}: the ranks run on {device.type}; expected none there, bitsandbytes needs a GPU")
    need(place, "bitsandbytes")


def quantization_config(setting: str, dtype: torch.dtype) -> Any:
    """What ``from_pretrained`` is given for ``--teacher_quantization``; None for ``none``.

    Args:
        setting: Its value.
        dtype: What products are computed in.
    """
    if setting not in BITS:
        return None
    from transformers import BitsAndBytesConfig

    if setting == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
