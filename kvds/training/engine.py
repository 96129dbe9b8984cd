"""The ZeRO engine around student and aligner: process group, optimizer, schedule, gradient norms."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import MethodType
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import nvtx as deepspeed_nvtx
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad
from torch import distributed as dist
from torch import nn
from transformers import get_scheduler

from kvds.config import RunConfig
from kvds.config.deepspeed_file import compute_dtype
from kvds.distillation.module import DistillationModule
from kvds.distributed.layer_gathering import gather_whole_layers
from kvds.errors import InputError, one_line
from kvds.models.buffers import buffers_kept
from kvds.models.compiled_layers import compile_as_asked
from kvds.models.loading import TORCH_DTYPES
from kvds.training.nonfinite_steps import leave_out_nonfinite_steps


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def build_optimizer(module: DistillationModule, cfg: RunConfig, engine_config: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW or SGD over student and aligner in groups of their own (learning rate, weight decay on matrices of the
    student).
    """
    student = [p for p in module.student.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in student if _dimensions(p) >= 2], "weight_decay": cfg.weight_decay, "name": "student"},
        {"params": [p for p in student if _dimensions(p) < 2], "weight_decay": 0.0, "name": "student_vectors"},
    ]
    if module.aligner is not None:
        aligner = [p for p in module.aligner.parameters() if p.requires_grad]
        lr = cfg.aligner_lr if cfg.aligner_lr is not None else cfg.lr
        groups.append({"params": aligner, "weight_decay": 0.0, "lr": lr, "name": "aligner"})
    if module.following_map is not None:
        followers = list(module.following_map.parameters())
        lr = cfg.aligner_lr if cfg.aligner_lr is not None else cfg.lr
        groups.append({"params": followers, "weight_decay": 0.0, "lr": lr, "name": "following_map"})
    groups = [group for group in groups if group["params"]]
    plain = _steps_plainly(engine_config)  # a fused kernel can leave a step out on the device
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr, fused=plain)  # a momentum would be unset after a first bad step
    offload = engine_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if offload != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=cfg.lr, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=cfg.lr, fused=plain or get_accelerator().device_name() == "cuda")


def clip_on_the_device(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Make a plain optimizer clip the global norm of the gradient, averaged over all ranks, before each step.

    DeepSpeed's own clipping copies two constants to the device, for which the host waits at each step
    (``torch.tensor(…, device=…)`` in ``deepspeed/runtime/utils.py:clip_grad_norm_``, 0.19.8).

    Args:
        optimizer: Its ``step`` is replaced.
        max_norm: Euclidean norm over all parameters, > 0.
    """
    take = optimizer.step

    def step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], max_norm)
        return take(*arguments, **keywords)

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]  # schedules wrap methods alone


def _steps_plainly(engine_config: dict[str, Any]) -> bool:
    """Whether DeepSpeed steps with the optimizer as it is, with none of its own around it that looks at gradients."""
    return engine_config["zero_optimization"]["stage"] == 0 and compute_dtype(engine_config) == "fp32"


def build_engine(
    module: DistillationModule, cfg: RunConfig, engine_config: dict[str, Any], total_steps: int
) -> deepspeed.DeepSpeedEngine:
    """Wrap ``module``. The learning-rate schedule is transformers' own, stepped by the engine once per optimizer
    step; after one that is left out only where the host does not know of it yet (:mod:`kvds.training.nonfinite_steps`).
    """
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        # Where one parameter was loaded in shards DeepSpeed casts none, and wants all of one dtype.
        for parameter in module.parameters():
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(TORCH_DTYPES[compute_dtype(engine_config)])
    optimizer = build_optimizer(module, cfg, engine_config)
    if _steps_plainly(engine_config):
        if engine_config["gradient_clipping"] > 0:
            clip_on_the_device(optimizer, engine_config["gradient_clipping"])
            engine_config = {**engine_config, "gradient_clipping": 0.0}
        leave_out_nonfinite_steps(optimizer)
    # DeepSpeed reduces a whole layer's gradients after each backward pass through it; with handoff there are two.
    whole = [] if module.following_map is not None else gather_whole_layers(module.student, engine_config)
    sharded = engine_config["zero_optimization"]["stage"] == 3
    device = torch.device(get_accelerator().current_device_name())
    compile_as_asked(module.student, cfg.compile, device, flag="student", layers=whole if sharded else None)
    deepspeed_nvtx.enable_nvtx = (
        False  # marks for a profiler around thousands of calls that the host is slow enough with
    )
    warmup = round(cfg.warmup_ratio * total_steps)
    scheduler = get_scheduler(cfg.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
    with buffers_kept(module):
        return deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=scheduler, config=engine_config)[0]


def check_engine_config(engine_config: dict[str, Any], path: str) -> None:
    """Let DeepSpeed read the configuration before any model is there; what it refuses is the file's fault.

    Raises:
        InputError: naming the file and DeepSpeed's reason.
    """
    try:
        DeepSpeedConfig(copy.deepcopy(engine_config))
    except Exception as error:  # schemas, assertions and errors of its own
        raise InputError(
            f"deepspeed_config={path}: DeepSpeed refuses it ({one_line(error)}); expected values that it takes "
            "(ds_configs/ has some)"
        ) from error


def gradient_norm(engine: deepspeed.DeepSpeedEngine, parameters: Iterable[nn.Parameter]) -> float:
    """Euclidean norm of the gradient that the last backward pass left on ``parameters``, over all ranks.

    Stage 3 keeps a shard of each gradient per rank; the stages below have the whole, averaged, on every rank.
    """
    sharded = engine.zero_optimization_stage() == 3
    device = torch.device(get_accelerator().current_device_name())
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in parameters:
        gradient = safe_get_local_grad(parameter) if sharded else safe_get_full_grad(parameter)
        if gradient is not None:
            total += gradient.double().square().sum()
    if sharded:
        dist.all_reduce(total)
    return float(total.sqrt())


def discard_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Forget the gradients of a backward pass that no step shall follow."""
    optimizer = engine.optimizer
    optimizer.zero_grad()
    # Below stage 3 the count of backward passes since the last step goes back only in a step; above 0 an offloaded
    # optimizer adds what comes next to what was forgotten. Its norms and its sign of an overflow stay, too.
    if hasattr(optimizer, "micro_step_id"):
        optimizer.micro_step_id = -1 if engine.zero_optimization_stage() < 3 else 0
    getattr(optimizer, "_offload_accumulated_param_ids", set()).clear()
    if hasattr(optimizer, "reset_cpu_buffers"):
        optimizer.reset_cpu_buffers()
    # Emptied, not replaced: below stage 3 the parameters read their gradients out of this very dictionary.
    getattr(engine.optimizer, "averaged_gradients", {}).clear()
    engine.zero_grad()
