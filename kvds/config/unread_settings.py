"""Settings that ask for what a run does not do: which setting is read only where another says so, in one table.

Where the other was not given, it was forgotten: that is refused. Where it was, with a value under which the setting
rests (``--logit_kd_weight 0``, ``--alignment_mode none``, as an arm of an experiment has them), one line tells of it.
What belongs to one alignment mode alone stands in :data:`kvds.config.alignment_modes.ALIGNMENT_MODES`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from kvds.config.alignment_modes import ALIGNMENT_MODES, modes_where
from kvds.config.all_settings import AllSettings
from kvds.config.selection_methods import SELECTION_METHODS
from kvds.config.setting_rules import Rule, shown_value
from kvds.config.values import DATA_SUFFIXES, split_dataset_weight
from kvds.errors import listed, one_line


class Need(NamedTuple):
    """What makes a run read a setting.

    Attributes:
        switches: The settings that decide it.
        met: Whether this run reads it.
        how: The flag that would make it, or that it does without.
    """

    switches: tuple[str, ...]
    met: Callable[[AllSettings], bool]
    how: str


def _matches_keys(cfg: AllSettings) -> bool:
    parts = ALIGNMENT_MODES[cfg.alignment_mode].parts if cfg.kv_parts == "auto" else cfg.kv_parts
    return "k" in parts or SELECTION_METHODS[cfg.kv_method].reads_keys


def _learns_layers(cfg: AllSettings) -> bool:
    mode = ALIGNMENT_MODES[cfg.alignment_mode]
    return mode.grouped or (cfg.layer_map or mode.layer_map) == "learned"


def _is_own(name: str) -> bool:
    return "/" in name or name.endswith(DATA_SUFFIXES) or os.path.isdir(name)


def _names(cfg: AllSettings) -> list[str]:
    return [split_dataset_weight(spec)[0] for spec in cfg.datasets]


def _methods(holds: Callable[[Any], bool]) -> str:
    return listed([name for name, method in SELECTION_METHODS.items() if holds(method)], "or")


_TEACHER = Need(("alignment_mode", "kv_weight"), lambda cfg: cfg.uses_teacher, "a loss that reads a teacher")
_RUNNING = Need(("teacher_cache",), lambda cfg: cfg.teacher_cache is None, "a teacher that runs (no --teacher_cache)")
_MATCHED = Need(("alignment_mode", "kv_weight"), lambda cfg: cfg.uses_kv, "an alignment with --kv_weight above 0")
_STATES = Need(("alignment_mode", "kv_weight"), lambda cfg: cfg.uses_teacher_kv, _MATCHED.how)
_MODE = ("alignment_mode",)
_KD = Need(("logit_kd_weight",), lambda cfg: cfg.logit_kd_weight > 0, "--logit_kd_weight above 0")
_JSD = Need(("logit_kd_loss",), lambda cfg: cfg.logit_kd_loss == "jsd", "--logit_kd_loss jsd")
_WRITTEN = Need(("on_policy_share",), lambda cfg: cfg.on_policy_share > 0, "--on_policy_share above 0")
_ADAPTERS = Need(("lora_r", "lora_config"), lambda cfg: cfg.uses_adapters, "--lora_r")
_OWN = Need(("datasets",), lambda cfg: any(map(_is_own, _names(cfg))), "data of your own in --datasets")
_UPLOAD = Need(("push_to_hub",), lambda cfg: cfg.push_to_hub, "--push_to_hub")
_BEST = Need(
    ("load_best_model_at_end", "early_stopping_patience"),
    lambda cfg: cfg.load_best_model_at_end or cfg.early_stopping_patience > 0,
    "--load_best_model_at_end or --early_stopping_patience",
)
_BOTH = Need(
    ("teacher_name", "teacher_names", "student_name"),
    lambda cfg: not (cfg.student_name and (cfg.teacher_name or cfg.teacher_names)),
    "a side that no other flag names",
)

NEEDS: Mapping[str, tuple[Need, ...]] = {
    "model_name": (_BOTH,),
    **dict.fromkeys(("teacher_init", "teacher_config_overrides", "teacher_quantization"), (_TEACHER,)),
    **dict.fromkeys(("teacher_placement", "teacher_overlap"), (_TEACHER, _RUNNING)),
    "teacher_tp_size": (
        Need(
            ("teacher_placement",),
            lambda cfg: cfg.teacher_placement == "tensor_parallel",
            "--teacher_placement tensor_parallel",
        ),
    ),
    "checkpoint_offload": (
        Need(
            ("gradient_checkpointing",),
            lambda cfg: cfg.gradient_checkpointing,
            "--gradient_checkpointing, whose layer inputs it moves",
        ),
    ),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "lora_target_modules"), (_ADAPTERS,)),
    **dict.fromkeys(("columns", "data_format", "assistant_turns", "streaming"), (_OWN,)),
    "synthetic_problems": (Need(("datasets",), lambda cfg: "synthetic" in _names(cfg), "synthetic in --datasets"),),
    **dict.fromkeys(
        (
            *("direction", "aligner_update", "layer_map", "map_start", "align_tokens", "kv_method", "kv_budget"),
            *("teacher_kv", "kv_parts", "value_metric", "token_weights", "kv_loss"),
            *("kv_weight_schedule", "kv_weight_until"),
            *("layer_groups", "head_groups", "teacher_cache"),
        ),
        (_MATCHED,),
    ),
    "kv_weight": (Need(_MODE, lambda cfg: ALIGNMENT_MODES[cfg.alignment_mode].aligned, "an alignment"),),
    "calibration_batches": (_STATES,),
    "aligner_lr": (
        _STATES,
        Need(
            ("aligner_update",),
            lambda cfg: cfg.handoff_weight > 0 or cfg.aligner_update == "trained",
            "--aligner_update trained",
        ),
    ),
    "map_proj_share_dim": (
        _MATCHED,
        Need(
            _MODE,
            lambda cfg: ALIGNMENT_MODES[cfg.alignment_mode].shares_dim,
            f"--alignment_mode {modes_where(lambda mode: mode.shares_dim)}".replace(" and ", " or "),
        ),
    ),
    "map_proj_init_uniform": (
        _MATCHED,
        Need(("alignment_mode", "layer_map"), _learns_layers, "--layer_map learned"),
    ),
    "impl": (
        _MATCHED,
        Need(
            _MODE,
            lambda cfg: ALIGNMENT_MODES[cfg.alignment_mode].fused,
            f"--alignment_mode {modes_where(lambda mode: mode.fused)}",
        ),
    ),
    "kv_rope": (_MATCHED, Need(("kv_parts", "kv_method"), _matches_keys, "keys that are matched (--kv_parts kv)")),
    "mask_first_token": (
        _MATCHED,
        Need(("align_tokens",), lambda cfg: cfg.align_tokens == "position", "--align_tokens position"),
    ),
    "rkv_lambda": (
        _MATCHED,
        Need(
            ("kv_method",),
            lambda cfg: SELECTION_METHODS[cfg.kv_method].weighs_redundancy,
            f"--kv_method {_methods(lambda method: method.weighs_redundancy)}",
        ),
    ),
    "observing_tokens": (
        _MATCHED,
        Need(
            ("kv_method",),
            lambda cfg: SELECTION_METHODS[cfg.kv_method].observing_tokens > 0,
            f"--kv_method {_methods(lambda method: method.observing_tokens > 0)}",
        ),
    ),
    **dict.fromkeys(("logit_kd_temperature", "logit_kd_loss", "logit_kd_top_k"), (_KD,)),
    "logit_kd_beta": (_KD, _JSD),
    "handoff_source_layers": (
        Need(("handoff_weight",), lambda cfg: cfg.handoff_weight > 0, "--handoff_weight above 0"),
    ),
    **dict.fromkeys(("on_policy_max_new_tokens", "on_policy_temperature", "on_policy_top_p"), (_WRITTEN,)),
    "epochs": (Need(("max_steps",), lambda cfg: cfg.max_steps is None, "no --max_steps, which overrides it"),),
    "eval_steps": (Need(("eval_subset_size",), lambda cfg: cfg.eval_subset_size > 0, "--eval_subset_size above 0"),),
    "metric_for_best_model": (_BEST,),
    **dict.fromkeys(("hub_model_id", "hub_private_repo"), (_UPLOAD,)),
}
"""Setting → what must all hold for a run to read it; the first that does not is told. All other settings are read."""


def _unread(cfg: AllSettings) -> Iterator[tuple[str, Need]]:
    """Settings with a value of their own that nothing reads, and what is missing for each."""
    for field in dataclasses.fields(cfg):
        if getattr(cfg, field.name) != field.default:
            missing = (need for need in NEEDS.get(field.name, ()) if not need.met(cfg))
            yield from ((field.name, need) for need in [*missing][:1])


def unread_rules(cfg: AllSettings, given: Collection[str]) -> Iterator[Rule]:
    """Nothing that only a forgotten flag would make the run read.

    Args:
        cfg: The run.
        given: Names of the settings that flags and recipe set.
    """
    for name, need in _unread(cfg):
        forgotten = not any(switch in given for switch in need.switches)
        [default] = [field.default for field in dataclasses.fields(cfg) if field.name == need.switches[0]]
        rests = f"--no_{need.switches[0]}" if default is False else f"--{need.switches[0]} {shown_value(default)}"
        expected = f"{need.how}, or nothing reads it (leave --{name} away, or say with {rests} that it shall rest)"
        yield not forgotten, name, shown_value(getattr(cfg, name)), expected


def unread_warning(cfg: AllSettings) -> str:
    """One line on the settings that nothing in this run reads; empty where there is none."""
    texts: dict[str, list[str]] = {}
    for name, need in _unread(cfg):
        texts.setdefault(need.how, []).append(f"{name}={one_line(shown_value(getattr(cfg, name)))}")
    unread = "; ".join(f"{', '.join(names)} (that takes {how})" for how, names in texts.items())
    return f"nothing reads {unread}" if texts else ""
