"""Rules of the alignment: which settings have a meaning under which mode and with which other settings."""

from __future__ import annotations

from collections.abc import Iterator

from kvds.config.alignment_modes import ALIGNMENT_MODES, modes_where
from kvds.config.selection_methods import SELECTION_METHODS, methods_without_keys
from kvds.config.setting_rules import Rule, check, range_rules
from kvds.config.settings import AlignmentSettings
from kvds.errors import listed


def mode_rules(settings: AlignmentSettings) -> Iterator[Rule]:
    """What has a meaning under the mode that is set."""
    name, mode = settings.alignment_mode, ALIGNMENT_MODES[settings.alignment_mode]
    under = f"with --alignment_mode {name}"
    for setting, only in mode.only.items():
        found = getattr(settings, setting)
        free = only.unless is not None and getattr(settings, only.unless[0]) == only.unless[1]
        expected = listed([str(value) for value in only.values if value is not None], "or")
        yield free or found in only.values, setting, found, f"{expected} {under} ({only.why})"
    for setting in ("layer_groups", "head_groups") if mode.aligned and not mode.grouped else ():
        found = getattr(settings, setting)
        yield found == 1, setting, found, f"1 {under} (groups are {modes_where(lambda m: m.grouped)}'s)"
    for owner, other in ALIGNMENT_MODES.items():
        for setting, default in other.own.items():
            found = getattr(settings, setting)
            shown = "none" if default is None else default
            expected = f"{shown} {under} (or --alignment_mode {owner})"
            yield name == owner or found == default, setting, found, expected
    several, learned = settings.source_layers_per_target, (settings.layer_map or mode.layer_map) == "learned"
    expected = "1 with --layer_map learned, which mixes all layers (or --layer_map endpoint)"
    yield several == 1 or not learned, "source_layers_per_target", several, expected
    if settings.value_metric == "output":
        expected = f"states {under} (values that a map leads to are {modes_where(lambda m: m.parts == 'v')}'s)"
        yield mode.parts == "v", "value_metric", "output", expected
        expected = "states with --kv_parts k (no values are matched)"
        yield settings.kv_parts != "k", "value_metric", "output", expected
        expected = "states with --direction teacher_to_student (the metric is that of the fixed target)"
        yield settings.direction == "student_to_teacher", "value_metric", "output", expected
    if settings.token_weights == "attention":
        expected = f"equal {under} (weights are taken by {modes_where(lambda m: m.weighs)})"
        yield mode.weighs, "token_weights", "attention", expected
        expected = "equal with --align_tokens segment (a step of reasoning is no token that is attended to)"
        yield settings.align_tokens == "position", "token_weights", "attention", expected
        expected = "equal with --impl triton, whose kernel takes no weights (--impl auto takes lean in its place)"
        yield not mode.fused or settings.impl != "triton", "token_weights", "attention", expected
    method = SELECTION_METHODS[settings.kv_method]
    expected = f"{listed(methods_without_keys(), 'or')} {under} (no keys are captured to choose by)"
    yield mode.takes_kv or not method.reads_keys, "kv_method", settings.kv_method, expected
    if settings.align_tokens == "segment":
        everything = listed([one for one, facts in SELECTION_METHODS.items() if not facts.budget], "or")
        expected = f"{everything} with --align_tokens segment (every step counts)"
        yield not method.budget, "kv_method", settings.kv_method, expected
        expected = "pre with --align_tokens segment (a mean over rotated keys means nothing)"
        yield settings.kv_rope == "pre", "kv_rope", settings.kv_rope, expected


def check_alignment(settings: AlignmentSettings) -> None:
    """Check the section by itself, as an aligner is given it.

    Raises:
        InputError: for the first rule that does not hold, as :func:`kvds.config.setting_rules.check`.
    """
    check(range_rules(settings))
    check(mode_rules(settings))
