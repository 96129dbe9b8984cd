"""Rules of rows that several samples share."""

from __future__ import annotations

from collections.abc import Iterator

from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.all_settings import AllSettings
from kvds.config.selection_methods import SELECTION_METHODS
from kvds.config.setting_rules import Rule


def needs_own_rows(cfg: AllSettings) -> str:
    """The flag whose meaning rests on whole rows, each of which holds one sample; empty where none does."""
    mode, method = ALIGNMENT_MODES[cfg.alignment_mode], SELECTION_METHODS[cfg.kv_method]
    for found, flag in (
        (cfg.uses_kv and method.reads_keys, f"--kv_method {cfg.kv_method}"),
        (cfg.uses_kv and mode.own_rows, f"--alignment_mode {cfg.alignment_mode}"),
        (cfg.uses_kv and cfg.align_tokens == "segment", "--align_tokens segment"),
        (cfg.uses_kv and cfg.teacher_kv == "shuffled", "--teacher_kv shuffled"),
        (cfg.handoff_weight > 0, "--handoff_weight"),
    ):
        if found:
            return flag
    return ""


def forbids_one_row(cfg: AllSettings) -> str:
    """The flag with which a micro-batch cannot be one row of ``--tokens_per_batch``, and why; empty where none does."""
    if flag := needs_own_rows(cfg):
        return f"{flag}, which reads samples in rows of their own"
    if cfg.attn_implementation == "eager":
        return "--attn_implementation eager, which would make a mask of the whole row (--attn_implementation sdpa)"
    if cfg.packing:
        return "--packing, which has rows of max_length (--no_packing)"
    if cfg.group_by_length:
        return "--group_by_length: one row holds no padding that grouping could save (--no_group_by_length)"
    return ""


def row_rules(cfg: AllSettings) -> Iterator[Rule]:
    """Packed rows, and micro-batches of one row."""
    if cfg.packing:
        remedy = "--no_packing with --group_by_length: packed rows hold no padding that grouping could save"
        yield not cfg.group_by_length, "packing", True, remedy
        flag = needs_own_rows(cfg)
        yield not flag, "packing", True, f"--no_packing with {flag}, which reads samples in rows of their own"
    tokens = cfg.tokens_per_batch
    if tokens:
        expected = f"at least max_length={cfg.max_length}, so that every sample fits, or 0 for padded rows"
        yield tokens >= cfg.max_length, "tokens_per_batch", tokens, expected
        reason = forbids_one_row(cfg)
        yield not reason, "tokens_per_batch", tokens, f"--tokens_per_batch 0 with {reason}"
