"""The configuration of the two engines, completed from the flags: nothing that DeepSpeed would fill in by itself."""

from __future__ import annotations

import copy
from typing import Any

from kvds.config.run_config import RunConfig
from kvds.errors import InputError


def student_engine_config(raw: dict[str, Any], cfg: RunConfig, world_size: int) -> dict[str, Any]:
    """Complete the configuration of the engine that trains: batch sizes from the flags, clipping always written.

    Raises:
        InputError: a batch size or clipping norm in the file contradicts the flags.
    """
    config = copy.deepcopy(raw)
    whole = cfg.batch_size * cfg.gradient_accumulation_steps * world_size
    expected = {
        "train_micro_batch_size_per_gpu": (cfg.batch_size, "--batch_size"),
        "gradient_accumulation_steps": (cfg.gradient_accumulation_steps, "--gradient_accumulation_steps"),
        "train_batch_size": (
            whole,
            f"--batch_size {cfg.batch_size} × --gradient_accumulation_steps {cfg.gradient_accumulation_steps} × "
            f"{world_size} ranks",
        ),
    }
    for key, (value, source) in expected.items():
        if config.setdefault(key, value) != value:
            raise InputError(
                f"deepspeed_config={cfg.deepspeed_config}: {key}={config[key]} contradicts {source} = {value}; "
                f"expected the same number, or no {key} in the file"
            )
    clipping = config.get("gradient_clipping", 0.0) if cfg.max_grad_norm is None else cfg.max_grad_norm
    # DeepSpeed clips at 1.0 where the key is absent.
    config["gradient_clipping"] = float(clipping)
    # Schedules and SGD are torch's and transformers' own, tested here against a plain loop.
    config["zero_allow_untested_optimizer"] = True
    # Its throughput timer waits for the device around each micro-batch; perf/tokens_per_second is measured without.
    config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    if cfg.optimizer == "sgd":
        # Offloading insists on DeepSpeed's CPU Adam unless told otherwise.
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def teacher_engine_config(raw: dict[str, Any], cfg: RunConfig, world_size: int) -> dict[str, Any]:
    """The configuration of a ZeRO-3 inference engine: the student's stage-3 numbers and precision, nothing trains."""
    zero = {
        k: v
        for k, v in raw["zero_optimization"].items()
        if k.startswith("stage3_") and k != "stage3_gather_16bit_weights_on_model_save"
    }
    zero["stage"] = 3
    if cfg.teacher_placement == "zero3_offload":
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": cfg.batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": cfg.batch_size * world_size,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
    }
    if "bf16" in raw:
        config["bf16"] = copy.deepcopy(raw["bf16"])
    return config
