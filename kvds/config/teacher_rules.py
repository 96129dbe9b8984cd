"""Rules of the teachers: their number, their cache, where they live, when they run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.all_settings import AllSettings
from kvds.config.selection_methods import SELECTION_METHODS
from kvds.config.setting_rules import Rule


def teacher_rules(cfg: AllSettings) -> Iterator[Rule]:
    """Number, weights, cache, placement and overlap."""
    yield from _several(cfg)
    if cfg.teacher_cache is not None:
        yield from cache_rules(cfg, cfg.teacher_cache)
    expected = "states with a teacher in parts, which no rank holds whole (--teacher_placement replicated)"
    whole = cfg.teacher_placement == "replicated" or cfg.value_metric == "states"
    yield whole, "value_metric", cfg.value_metric, expected
    expected = "off with --hidden_at attention (compiled layers have no output of attention that could be read)"
    yield cfg.compile == "off" or cfg.hidden_at == "layer", "compile", cfg.compile, expected
    yield from _heads(cfg)
    yield from _overlap(cfg)
    yield from _quantization(cfg)


def _several(cfg: AllSettings) -> Iterator[Rule]:
    names, weights = cfg.teacher_names, cfg.teacher_weights
    several = "one teacher, since only keys and values are matched with several (--teacher_name)"
    if not names:
        yield not weights, "teacher_weights", "given", "several teachers to weigh (--teacher_names A B)"
        return
    yield cfg.teacher_name is None, "teacher_name", cfg.teacher_name, "one of --teacher_name, --teacher_names"
    yield cfg.uses_kv, "teacher_names", " ".join(names), several
    yield cfg.logit_kd_weight == 0, "logit_kd_weight", cfg.logit_kd_weight, f"0, or {several}"
    expected = f"one weight for each of the {len(names)} teachers (--teacher_weights)"
    yield len(weights) in (0, len(names)), "teacher_weights", " ".join(map(str, weights)), expected
    for weight in weights:
        yield 0 < weight < math.inf, "teacher_weights", weight, "numbers above 0 (--teacher_weights 0.5 0.5)"


def cache_rules(cfg: AllSettings, folder: str | Path) -> Iterator[Rule]:
    """What a cache of one teacher's keys and values in ``folder``, at positions known without it, cannot serve."""
    mode, method = ALIGNMENT_MODES[cfg.alignment_mode], SELECTION_METHODS[cfg.kv_method]
    for found, flag in (
        (cfg.logit_kd_weight > 0, "--logit_kd_weight: a cache holds keys and values, no logits"),
        (method.draws, f"--kv_method {cfg.kv_method}, which draws other positions in each step"),
        (method.reads_keys, f"--kv_method {cfg.kv_method}, which reads the teacher's keys to choose"),
        (not mode.takes_kv, f"--alignment_mode {cfg.alignment_mode}: a cache holds keys and values"),
        (cfg.align_tokens == "segment", "--align_tokens segment: a cache holds positions"),
        (cfg.teacher_kv == "shuffled", "--teacher_kv shuffled, which exchanges whole rows"),
        (cfg.value_metric != "states", f"--value_metric {cfg.value_metric}: a cache holds values as they are"),
        (cfg.token_weights == "attention", f"--token_weights {cfg.token_weights}, which reads the teacher's queries"),
        (bool(cfg.teacher_names), "--teacher_names: a cache is that of one teacher"),
    ):
        yield not found, "teacher_cache", str(folder), f"no --teacher_cache with {flag}"


def _heads(cfg: AllSettings) -> Iterator[Rule]:
    if cfg.teacher_placement != "tensor_parallel":
        return
    expected = "auto or off with --teacher_placement tensor_parallel, whose layers are in parts"
    yield cfg.compile != "on", "compile", cfg.compile, expected
    yield cfg.teacher_tp_size >= 2, "teacher_tp_size", cfg.teacher_tp_size, "at least 2 ranks"
    mode, method = ALIGNMENT_MODES[cfg.alignment_mode], SELECTION_METHODS[cfg.kv_method]
    for found, flag in (
        (cfg.logit_kd_weight > 0, "--logit_kd_weight, which reads the teacher's logits"),
        (method.reads_keys, f"--kv_method {cfg.kv_method}, which reads the teacher's queries"),
        (cfg.token_weights == "attention", f"--token_weights {cfg.token_weights}, which reads the teacher's queries"),
        (not mode.takes_kv, f"--alignment_mode {cfg.alignment_mode}"),
    ):
        expected = f"replicated, zero3 or zero3_offload with {flag}: only keys and values are exchanged"
        yield not found, "teacher_placement", "tensor_parallel", expected


def _quantization(cfg: AllSettings) -> Iterator[Rule]:
    if cfg.teacher_quantization == "none":
        return
    for found, flag in (
        (
            cfg.teacher_placement != "replicated",
            f"--teacher_placement {cfg.teacher_placement}: it is whole on each rank",
        ),
        (cfg.teacher_cache is not None, "--teacher_cache: no teacher runs"),
        (cfg.teacher_init == "random", "--teacher_init random: weights are quantised as they are read"),
        (cfg.compile == "on", "--compile on: compiled layers read plain weights"),
    ):
        yield not found, "teacher_quantization", cfg.teacher_quantization, f"none with {flag}"


def _overlap(cfg: AllSettings) -> Iterator[Rule]:
    if not cfg.teacher_overlap:
        return
    placement = cfg.teacher_placement
    for found, flag in (
        (cfg.teacher_cache is not None, "--teacher_cache: no teacher runs"),
        (bool(cfg.teacher_names), "--teacher_names: one teacher's keys and values are held at a time"),
        (
            placement != "replicated",
            f"--teacher_placement {placement}: collectives of teacher and student on two streams can wait for each "
            "other for ever (--teacher_placement replicated)",
        ),
    ):
        yield not found, "teacher_overlap", True, f"--no_teacher_overlap with {flag}"
