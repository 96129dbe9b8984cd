"""Which settings have a meaning under which alignment mode."""

from __future__ import annotations

from collections.abc import Iterator

from kvds.config.setting_rules import Rule, range_rules
from kvds.config.settings import AlignmentSettings
from kvds.errors import InputError

_BOTH_PARTS = ("auto", "kv")
# mode → setting → the one value that has a meaning there (or a tuple of those that do), and why.
_FIXED: dict[str, dict[str, tuple[object, str]]] = {
    "flat": {
        "layer_groups": (1, "groups are structured's"),
        "head_groups": (1, "groups are structured's"),
    },
    "hidden": {
        "kv_parts": (_BOTH_PARTS, "hidden states are neither keys nor values"),
        "kv_rope": ("pre", "hidden states are not rotated"),
        "layer_groups": (1, "groups are structured's"),
        "head_groups": (1, "groups are structured's"),
    },
    "structural_kv": {
        "direction": ("student_to_teacher", "the teacher is the fixed side"),
        "kv_parts": (_BOTH_PARTS, "its attention needs keys, its cosine both"),
        "kv_loss": ("mse", "its penalties are a cosine and a KL divergence"),
        "layer_groups": (1, "groups are structured's"),
        "head_groups": (1, "groups are structured's"),
    },
    "relation": {
        "direction": ("student_to_teacher", "nothing is mapped: the teacher's relations are the target"),
        "aligner_update": ("trained", "no map is there to be frozen"),
        "map_start": ("random", "no map is there to be fitted"),
        "layer_groups": (1, "groups are structured's"),
        "head_groups": (1, "groups are structured's"),
    },
}  # fmt: skip
READS_KEYS = ("snapkv", "keydiff", "rkv", "rkv_window")
"""Selection methods that score tokens by the teacher's keys."""
_OWN: dict[str, dict[str, object]] = {
    "relation": {"relation_kind": "softmax", "relation_heads": None, "relation_units": "standard"},
    "structural_kv": {"attention_loss_weight": 1.0},
}


def mode_rules(settings: AlignmentSettings) -> Iterator[Rule]:
    """Rules of the mode that is set: whether one holds, the setting, its value, and what was expected."""
    mode = settings.alignment_mode
    for name, (value, reason) in _FIXED.get(mode, {}).items():
        found = getattr(settings, name)
        values = value if isinstance(value, tuple) else (value,)
        expected = " or ".join(str(one) for one in values)
        yield found in values, name, found, f"{expected} with --alignment_mode {mode} ({reason})"
    for owner, defaults in _OWN.items():
        for name, default in defaults.items():
            found = getattr(settings, name)
            shown = "none" if default is None else default
            yield (
                mode == owner or found == default, name, found,
                f"{shown} with --alignment_mode {mode} (or --alignment_mode {owner})",
            )  # fmt: skip
    yield (
        mode != "hidden" or settings.kv_method not in READS_KEYS, "kv_method", settings.kv_method,
        "full, right_crop, uniform or random with --alignment_mode hidden (no keys are captured to choose by)",
    )  # fmt: skip
    if settings.align_tokens == "segment":
        yield (
            settings.kv_method == "full", "kv_method", settings.kv_method,
            "full with --align_tokens segment (every step counts)",
        )  # fmt: skip
        yield (
            settings.kv_rope == "pre", "kv_rope", settings.kv_rope,
            "pre with --align_tokens segment (a mean over rotated keys means nothing)",
        )  # fmt: skip
        yield (
            mode != "structural_kv", "align_tokens", "segment",
            "position with --alignment_mode structural_kv (attention is given to tokens)",
        )  # fmt: skip
    softmax = mode == "relation" and settings.relation_kind == "softmax"
    yield (
        not softmax or settings.kv_loss == "mse", "kv_loss", settings.kv_loss,
        "mse, the default, with --relation_kind softmax, whose loss is a KL divergence (or --relation_kind cosine)",
    )  # fmt: skip
    yield (
        mode != "structural_kv" or settings.layer_map != "learned", "layer_map", settings.layer_map,
        "endpoint or last_aligned with --alignment_mode structural_kv, where a query meets one teacher layer's keys",
    )  # fmt: skip


def check_mode(settings: AlignmentSettings) -> None:
    """Raise for the first rule that does not hold.

    Raises:
        InputError: naming the setting, its value and what was expected.
    """
    for holds, name, value, expected in (*range_rules(settings), *mode_rules(settings)):
        if not holds:
            raise InputError(f"{name}={value}: expected {expected}")
