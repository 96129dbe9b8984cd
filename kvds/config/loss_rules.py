"""Rules of the losses: how many positions count, what each loss weighs, and that there is one to train on."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.all_settings import AllSettings
from kvds.config.selection_methods import SELECTION_METHODS
from kvds.config.setting_rules import Rule
from kvds.config.settings import AlignmentSettings
from kvds.config.values import number


def selection_rules(cfg: AlignmentSettings) -> Iterator[Rule]:
    """How many positions count, under the method that chooses them."""
    budget, method = cfg.kv_budget, SELECTION_METHODS[cfg.kv_method]
    if isinstance(budget, float):
        yield 0 < budget <= 1, "kv_budget", budget, "a fraction in (0, 1], or a whole number of tokens"
    elif budget is not None:
        yield budget >= 1, "kv_budget", budget, "at least 1 token, or a fraction in (0, 1] (or --kv_method full)"
    if method.budget:
        expected = f"a number of tokens or a fraction with --kv_method {cfg.kv_method}"
        yield budget is not None, "kv_budget", budget, expected
    else:
        expected = f"no budget with --kv_method {cfg.kv_method} (or --kv_method right_crop)"
        yield budget is None, "kv_budget", budget, expected
    if method.keeps_window and isinstance(budget, int):
        window = cfg.observing_tokens or method.observing_tokens
        expected = f"more tokens than the {window} observing ones, all of which are kept (--observing_tokens)"
        yield budget > window, "kv_budget", budget, expected


def kv_weight_rules(cfg: AlignmentSettings) -> Iterator[Rule]:
    """What the KV loss weighs, and whether its maps have a start."""
    expected = "a number of at least 0, or auto:SHARE such as auto:2.0, or hold:SHARE, or balance:SHARE"
    yield _is_weight(cfg.kv_weight), "kv_weight", cfg.kv_weight, expected
    if ALIGNMENT_MODES[cfg.alignment_mode].aligned and cfg.aligner_update == "frozen":
        expected = "--map_start pca, procrustes or ridge: a frozen random map has no meaning"
        yield cfg.chosen_map_start != "random", "aligner_update", "frozen", expected


def weight_rules(cfg: AllSettings) -> Iterator[Rule]:
    """What each loss weighs, and whether there is something to learn from it."""
    yield from kv_weight_rules(cfg)
    if cfg.kv_weight_held:
        expected = "constant with --kv_weight hold:SHARE, which moves the weight itself"
        yield cfg.kv_weight_schedule == "constant", "kv_weight_schedule", cfg.kv_weight_schedule, expected
        yield cfg.kv_weight_until == 1, "kv_weight_until", cfg.kv_weight_until, expected.replace("constant", "1")
    if cfg.uses_kv and cfg.teacher_kv == "shuffled":
        expected = "a --batch_size above 1: a row alone has no other to borrow from"
        yield cfg.batch_size > 1, "teacher_kv", "shuffled", expected
    if cfg.kv_weight_until < 1:
        expected = "1 where the KV loss is all there is to train on (or --task_weight 1)"
        others = cfg.task_weight > 0 or cfg.logit_kd_weight > 0
        yield others, "kv_weight_until", cfg.kv_weight_until, expected
    if cfg.task_weight == 0:
        expected = "some loss to train on (--task_weight 1, or an alignment with --kv_weight above 0)"
        yield cfg.uses_teacher, "task_weight", 0, expected
        calibrated = cfg.uses_kv and cfg.kv_weight_share is not None
        expected = "a number when --task_weight is 0: there is no task gradient to take a share of"
        yield not calibrated, "kv_weight", cfg.kv_weight, expected


def collapse_warning(cfg: AllSettings) -> str:
    """What is told of a map that can make its target smaller; empty where none can."""
    if not (cfg.uses_kv and cfg.direction == "teacher_to_student" and cfg.aligner_update == "trained"):
        return ""
    return (
        "--direction teacher_to_student with a trained map collapses: the KV loss falls while the student's keys and "
        "values shrink to nothing; expected --direction student_to_teacher, or --aligner_update frozen --map_start pca"
    )


def _is_weight(value: str | float) -> bool:
    if not isinstance(value, str):
        return math.isfinite(value) and value >= 0
    head, _, text = value.partition(":")
    share = number(text)
    return head in ("auto", "hold", "balance") and not isinstance(share, str) and 0 < share < math.inf
