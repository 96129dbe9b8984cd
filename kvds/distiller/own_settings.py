"""The alignment's settings, as they have a meaning in a loop that is not kvds' own."""

from __future__ import annotations

import logging
from dataclasses import asdict, fields, replace

from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.alignment_rules import check_alignment
from kvds.config.all_settings import AllSettings
from kvds.config.loss_rules import kv_weight_rules, selection_rules
from kvds.config.setting_rules import check, kind_rules
from kvds.config.settings import AlignmentSettings
from kvds.config.unread_settings import unread_warning

log = logging.getLogger("kvds")


def own_settings(settings: AlignmentSettings) -> AlignmentSettings:
    """The section with ``map_start`` chosen: a student of one's own loop is taken for pretrained. What nothing reads is
    told.

    Raises:
        InputError: a setting without a meaning, by itself, with the others or without a run.
    """
    settings = settings.alignment()
    for field in fields(settings):
        check(kind_rules(field, getattr(settings, field.name)))
    if settings.map_start == "auto" and ALIGNMENT_MODES[settings.alignment_mode].mapped:
        settings = replace(settings, map_start="ridge")
    check_alignment(settings)
    check(selection_rules(settings))
    check(kv_weight_rules(settings))
    without = "in a loop of one's own"
    known = not isinstance(settings.kv_weight, str) or settings.kv_weight.startswith("auto:")
    by_hand = f"{without} (set kv_weight on the way)"
    constant = settings.kv_weight_schedule == "constant"
    by_position = settings.align_tokens == "position"
    check(
        [
            (known, "kv_weight", settings.kv_weight, f"a number or auto:SHARE {by_hand}"),
            (constant, "kv_weight_schedule", settings.kv_weight_schedule, f"constant {by_hand}"),
            (settings.kv_weight_until == 1, "kv_weight_until", settings.kv_weight_until, f"1 {by_hand}"),
            (settings.handoff_weight == 0, "handoff_weight", settings.handoff_weight, f"0 {without}"),
            (by_position, "align_tokens", settings.align_tokens, f"position {without}"),
        ]
    )
    if unread := unread_warning(AllSettings(**asdict(settings), output_dir="")):
        log.warning("%s", unread)
    return settings
