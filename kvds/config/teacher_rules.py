"""Which settings of the teachers go together: their number, where they live, when they run."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.all_settings import AllSettings
from kvds.config.selection_methods import SELECTION_METHODS
from kvds.config.setting_rules import Rule


def teacher_rules(cfg: AllSettings) -> Iterator[Rule]:
    """Whether it holds, the setting, its value and what was expected: one for each rule."""
    yield from _several(cfg)
    yield from _heads(cfg)
    yield from _overlap(cfg)


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


def _heads(cfg: AllSettings) -> Iterator[Rule]:
    if cfg.teacher_placement != "tensor_parallel":
        return
    yield cfg.teacher_tp_size >= 2, "teacher_tp_size", cfg.teacher_tp_size, "at least 2 ranks"
    mode, method = ALIGNMENT_MODES[cfg.alignment_mode], SELECTION_METHODS[cfg.kv_method]
    for found, flag in (
        (cfg.logit_kd_weight > 0, "--logit_kd_weight, which reads the teacher's logits"),
        (method.reads_keys, f"--kv_method {cfg.kv_method}, which reads the teacher's queries"),
        (not mode.takes_kv, f"--alignment_mode {cfg.alignment_mode}"),
    ):
        expected = f"replicated, zero3 or zero3_offload with {flag}: only keys and values are exchanged"
        yield not found, "teacher_placement", "tensor_parallel", expected


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
