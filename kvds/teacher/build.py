"""The teachers of a run, built as its configuration says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from kvds.align.loss import state_names
from kvds.config import RunConfig
from kvds.config.deepspeed_file import compute_dtype
from kvds.config.engine_config import teacher_engine_config
from kvds.data.batches import TokenBatch
from kvds.kv import ObservingRows
from kvds.models.loading import TORCH_DTYPES, load_model
from kvds.models.quantized import check_quantizable, quantization_config
from kvds.teacher.cached import CachedTeacher
from kvds.teacher.teacher import Teacher
from kvds.teacher.tensor_parallel import check_heads


def build_teachers(
    cfg: RunConfig,
    configs: Sequence[Any],
    raw: dict[str, Any],
    *,
    device: torch.device,
    observe: Callable[[TokenBatch], ObservingRows | None],
    made_of: Callable[[Any], dict[str, str]],
) -> list[Teacher | CachedTeacher]:
    """One teacher for each of ``configs``; every rank calls it.

    Args:
        cfg: The run.
        configs: The teachers' model configurations, in the order of ``cfg.all_teachers``.
        raw: The DeepSpeed configuration file.
        device: Of this rank.
        observe: As of :class:`kvds.teacher.teacher.Teacher`.
        made_of: From a model configuration to what a cache of that teacher must have been made of.

    Raises:
        InputError: a teacher that cannot be loaded or dealt out, or the cache of another one.
    """
    dtype = TORCH_DTYPES[compute_dtype(raw)]
    if cfg.teacher_cache is not None:
        folder, first = Path(cfg.teacher_cache), dist.get_rank() == 0
        return [
            CachedTeacher(folder, dtype=dtype, device=device, fingerprint=made_of(config), verify=first)
            for config in configs
        ]
    check_quantizable(cfg, device)
    shared = cfg.teacher_placement == "tensor_parallel"
    if shared:
        for config in configs:
            check_heads(config, cfg.teacher_tp_size, dist.get_world_size())
    whole = shared or cfg.teacher_placement == "replicated"
    teachers: list[Teacher | CachedTeacher] = []
    for number, config in enumerate(configs):
        placed = None if whole else teacher_engine_config(raw, cfg, dist.get_world_size())
        model = load_model(
            cfg.all_teachers[number], config, init=cfg.teacher_init, dtype=dtype,
            attn_implementation=cfg.attn_implementation, seed=cfg.teacher_seed(number), flag="teacher",
            engine_config=placed, quantization=quantization_config(cfg.teacher_quantization, dtype),
        )  # fmt: skip
        teachers.append(
            Teacher(
                model, device=device, engine_config=placed, rope=cfg.kv_rope,
                wants_states=cfg.uses_teacher_kv, reads=cfg.teacher_reads,
                wants_hidden=cfg.logit_kd_weight > 0, parts=state_names(cfg),
                observe=observe, shuffled=cfg.teacher_kv == "shuffled",
                tensor_parallel=cfg.teacher_tp_size if shared else 1, compiled=cfg.compile,
                value_metric=cfg.value_metric,
            )
        )  # fmt: skip
    return teachers
