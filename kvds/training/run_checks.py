"""Checks of a run before it is started: all that can be told of its models, tokenizer, rows and files without weights.

``--dry_run`` asks here, and an experiment does for each of its runs before the first of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from kvds.align import build_aligner
from kvds.config import RunConfig
from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.deepspeed_file import compute_dtype
from kvds.config.engine_config import student_engine_config, teacher_engine_config
from kvds.data.run_data import RunData, load_run_data
from kvds.handoff.following_map import following_map
from kvds.kv import KVShape
from kvds.models.architecture import ModelConfigs, load_model_configs
from kvds.models.compiled_layers import check_compilable
from kvds.models.loading import TORCH_DTYPES
from kvds.models.tokenizer import check_same_tokenizer, load_tokenizer
from kvds.teacher.cache_fingerprint import cache_fingerprint, check_fingerprint
from kvds.teacher.cache_shards import ShardReader
from kvds.training.engine import check_engine_config


class CheckedRun(NamedTuple):
    """What was read of a run on the way."""

    tokenizer: PreTrainedTokenizerBase
    models: ModelConfigs
    data: RunData


def check_run(cfg: RunConfig, raw: dict[str, Any], *, ranks: int, kernel: bool = True) -> CheckedRun:
    """Check all of a run but its output folder, and whether this machine has room for it.

    Args:
        cfg: The run.
        raw: Its DeepSpeed configuration.
        ranks: Processes that it will have.
        kernel: Try a kernel that is asked for out on this machine's device.

    Raises:
        InputError: what would end the run.
    """
    _check_engine(cfg, raw, ranks)
    tokenizer = load_tokenizer(cfg)
    check_same_tokenizer(cfg, tokenizer)
    student, teachers = models = load_model_configs(cfg, tokenizer)
    check_compilable(cfg, models)
    data = load_run_data(cfg, tokenizer, rank=0, world_size=ranks)
    _check_aligners(cfg, student, teachers, raw, kernel=kernel)
    if cfg.teacher_placement == "tensor_parallel" and cfg.teacher_cache is None:
        from kvds.teacher.tensor_parallel import check_heads  # imports DeepSpeed's inference

        for teacher in teachers:
            check_heads(teacher, cfg.teacher_tp_size, ranks)
    if cfg.teacher_cache is not None:
        _check_cache(cfg, tokenizer, teachers[0], raw)
    return CheckedRun(tokenizer, models, data)


def _check_engine(cfg: RunConfig, raw: dict[str, Any], ranks: int) -> None:
    config = student_engine_config(raw, cfg, ranks)
    # DeepSpeed multiplies by the ranks of a process group, and there is none.
    config["train_batch_size"] = cfg.batch_size * cfg.gradient_accumulation_steps
    check_engine_config(config, cfg.deepspeed_config)
    if cfg.uses_teacher and cfg.teacher_placement in ("zero3", "zero3_offload"):
        check_engine_config(teacher_engine_config(raw, cfg, 1), cfg.deepspeed_config)


def _check_aligners(cfg: RunConfig, student: Any, teachers: list[Any], raw: dict[str, Any], *, kernel: bool) -> None:
    if cfg.handoff_weight:
        with torch.device("meta"):
            following_map(KVShape.from_config(teachers[0]), KVShape.from_config(student), cfg.handoff_source_layers)
    if not cfg.uses_kv:
        return
    kernel = kernel and cfg.impl == "triton" and ALIGNMENT_MODES[cfg.alignment_mode].fused
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device if kernel else "meta"):
        members = [
            build_aligner(KVShape.from_config(student), KVShape.from_config(teacher), cfg) for teacher in teachers
        ]
    for member in members if kernel else ():
        member.try_out(TORCH_DTYPES[compute_dtype(raw)], torch.device(device))


def _check_cache(cfg: RunConfig, tokenizer: Any, teacher: Any, raw: dict[str, Any]) -> None:
    """All that a cache was made of but its rows, whose tokens are compared when the run reads them."""
    dtype = compute_dtype(raw)
    folder = Path(cfg.teacher_cache or "")
    found = ShardReader(folder, TORCH_DTYPES[dtype], verify=False).manifest["fingerprint"]
    expected = cache_fingerprint(cfg, tokenizer, teacher, [], dtype)
    check_fingerprint(found, {name: text for name, text in expected.items() if name != "data set"}, folder)
