"""Rules of handoff in training: what a student can write from."""

from __future__ import annotations

from collections.abc import Iterator

from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.all_settings import AllSettings
from kvds.config.setting_rules import Rule


def handoff_rules(cfg: AllSettings) -> Iterator[Rule]:
    """What goes with ``--handoff_weight``: the keys and values of one teacher, all of a prompt, as they are."""
    if not cfg.handoff_weight:
        return
    mode = ALIGNMENT_MODES[cfg.alignment_mode]
    for found, flag in (
        (bool(cfg.teacher_names), "--teacher_names: a cache is that of one teacher (--teacher_name)"),
        (cfg.kv_method != "full", f"--kv_method {cfg.kv_method}, which leaves holes in a prompt (--kv_method full)"),
        (cfg.kv_rope != "pre", "--kv_rope post: keys are mapped before their rotation (--kv_rope pre)"),
        (mode.aligned and not mode.takes_kv, f"--alignment_mode {cfg.alignment_mode}: the teacher gives hidden states"),
        (cfg.align_tokens != "position", "--align_tokens segment: a cache holds tokens (--align_tokens position)"),
        (cfg.teacher_kv != "matched", "--teacher_kv shuffled: nothing can be answered from another row's prompt"),
        (cfg.gradient_checkpointing, "--gradient_checkpointing: a layer that is computed again takes no cache"),
        (cfg.teacher_placement == "tensor_parallel", "--teacher_placement tensor_parallel (--teacher_placement zero3)"),
    ):
        yield not found, "handoff_weight", cfg.handoff_weight, f"0 with {flag}"
