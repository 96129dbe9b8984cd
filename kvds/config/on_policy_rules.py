"""Rules of completions that the student writes itself: what can be done with them, and what cannot."""

from __future__ import annotations

from collections.abc import Iterator

from kvds.config.all_settings import AllSettings
from kvds.config.setting_rules import Rule


def on_policy_rules(cfg: AllSettings) -> Iterator[Rule]:
    """What goes with ``--on_policy_share``: a teacher that runs, on rows that are made at each step."""
    share = cfg.on_policy_share
    if not share:
        return
    expected = "0 without a loss that reads the teacher: it alone judges completions (--logit_kd_weight 1)"
    yield cfg.uses_teacher, "on_policy_share", share, expected
    for found, flag in (
        (cfg.teacher_cache is not None, "--teacher_cache: it holds the rows as they were, no completion is in it"),
        (cfg.teacher_overlap, "--teacher_overlap: the next step's rows are written after this one's optimizer step"),
        (
            cfg.uses_kv and cfg.align_tokens == "segment",
            "--align_tokens segment: the steps of a completion are unknown",
        ),
        (cfg.handoff_weight > 0, "--handoff_weight, which writes answers that are known (--handoff_weight 0)"),
    ):
        yield not found, "on_policy_share", share, f"0 with {flag}"
    expected = "0 with --on_policy_share 1: completions have no task loss (or a share below 1)"
    yield share < 1 or cfg.task_weight == 0, "task_weight", cfg.task_weight, expected
