"""Tokens of a micro-batch where the run leaves them open: what this machine has room for."""

from __future__ import annotations

import logging
from dataclasses import replace

from kvds.config import RunConfig
from kvds.config.row_rules import forbids_one_row
from kvds.errors import InputError
from kvds.models.architecture import forbids_shared_rows, load_config
from kvds.plan.batch_shape import BatchShape
from kvds.plan.estimate import Machine, RunPlan
from kvds.plan.rows import RowPlan
from kvds.plan.several import SeveralTeachersPlan

log = logging.getLogger("kvds")

MOST_TOKENS = 40960
"""Under ZeRO-3 the host needs about 0.2 s for a micro-batch of whatever size, which so many tokens of a small pair hide
(``benchmarks/results/``); larger ones gain little and take memory."""
_MULTIPLE = 1024
# A step of so few tokens takes less in one row than the padded rows that were asked for: no plan, which takes seconds.
_UNPLANNED = 8192
# Of what is usable: rows that differ from step to step leave holes in the allocator's blocks.
_SHARE = 0.9


def with_token_budget(cfg: RunConfig, machine: Machine) -> RunConfig:
    """``cfg`` with ``tokens_per_batch`` as a number: its own, or what fits, or 0 where rows of their own are needed."""
    if cfg.tokens_per_batch is not None:
        return cfg
    if not machine.gpus:
        return replace(cfg, tokens_per_batch=0)
    reason = forbids_one_row(cfg) or _models_forbid(cfg)
    tokens = 0 if reason else fitting_tokens(cfg, machine)
    if reason:
        log.info("micro-batches: %d rows, for %s", cfg.batch_size, reason)
    elif not tokens:
        log.info("micro-batches: %d padded rows: no row of --max_length tokens fits by `kvds plan`", cfg.batch_size)
    else:
        log.info("micro-batches: one row of at most %d tokens each (--tokens_per_batch)", tokens)
    return replace(cfg, tokens_per_batch=tokens)


def _models_forbid(cfg: RunConfig) -> str:
    teachers = cfg.all_teachers if cfg.uses_teacher else ()
    named = [("student", cfg.student), *(("teacher", name) for name in teachers)]
    try:
        configs = [load_config(name, getattr(cfg, f"{flag}_config_overrides"), flag=flag) for flag, name in named]
    except InputError:  # told where the run itself needs them
        return ""
    return forbids_shared_rows(cfg, configs)


def fitting_tokens(cfg: RunConfig, machine: Machine) -> int:
    """The longest row that fits, at most :data:`MOST_TOKENS` and at most a rank's whole share of a step; 0 where not
    even one of ``max_length`` does, or nobody knows.
    """
    share = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.max_length
    most = max(cfg.max_length, min(MOST_TOKENS, share))
    small = max(cfg.max_length, most // 4)
    if cfg.gradient_accumulation_steps == 1 and share <= _UNPLANNED:
        return most
    room = _SHARE * machine.usable
    try:
        # Memory grows evenly with a row's tokens: two rows tell of all between them.
        below, above = (_peak(cfg, machine, tokens) for tokens in (small, most))
    except InputError:
        return 0
    if above <= room:
        return most
    if above == below:
        return 0
    tokens = int(small + (room - below) * (most - small) / (above - below))
    multiple = _MULTIPLE if tokens >= _MULTIPLE else cfg.max_length
    rounded = tokens // multiple * multiple
    return rounded if rounded >= cfg.max_length else 0


def _peak(cfg: RunConfig, machine: Machine, tokens: int) -> int:
    """Bytes at the worst moment with micro-batches of one row of ``tokens``, all of which count."""
    cfg = replace(cfg, tokens_per_batch=tokens)
    largest = BatchShape(1, tokens, tokens, tokens, -(-tokens // cfg.max_length))
    rows = RowPlan(largest, cfg.max_length - 1, None, None, None, "")
    plan = SeveralTeachersPlan(cfg, machine, rows) if cfg.teacher_names else RunPlan(cfg, machine, rows)
    return plan.peak
