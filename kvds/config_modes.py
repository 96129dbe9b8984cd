"""Which settings have a meaning under which alignment mode."""

from __future__ import annotations

from collections.abc import Iterator

from kvds.settings import AlignmentSettings

# mode → setting → the one value that has a meaning there, and why.
_FIXED: dict[str, dict[str, tuple[object, str]]] = {
    "flat": {
        "layer_groups": (1, "groups are structured's"),
        "head_groups": (1, "groups are structured's"),
    },
    "hidden": {
        "kv_parts": ("kv", "hidden states are neither keys nor values"),
        "kv_rope": ("pre", "hidden states are not rotated"),
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
_OWN = {"relation": {"relation_kind": "softmax", "relation_heads": None, "relation_units": "standard"}}


def mode_rules(settings: AlignmentSettings) -> Iterator[tuple[bool, str, object, str]]:
    """Rules of the mode that is set: whether one holds, the setting, its value, and what was expected."""
    mode = settings.alignment_mode
    for name, (value, reason) in _FIXED.get(mode, {}).items():
        found = getattr(settings, name)
        yield found == value, name, found, f"{value} with --alignment_mode {mode} ({reason})"
    for owner, defaults in _OWN.items():
        for name, default in defaults.items():
            found = getattr(settings, name)
            shown = "none" if default is None else default
            yield (
                mode == owner or found == default, name, found,
                f"{shown} with --alignment_mode {mode} (or --alignment_mode {owner})",
            )  # fmt: skip
    heads = settings.relation_heads
    yield heads is None or heads >= 1, "relation_heads", heads, "at least 1 (or leave --relation_heads away)"
    softmax = mode == "relation" and settings.relation_kind == "softmax"
    yield (
        not softmax or settings.kv_loss == "mse", "kv_loss", settings.kv_loss,
        "mse, the default, with --relation_kind softmax, whose loss is a KL divergence (or --relation_kind cosine)",
    )  # fmt: skip
