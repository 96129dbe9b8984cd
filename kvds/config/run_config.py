"""Run configuration: all settings of a run, checked each and together. Knows no file format and no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvds.config.adapter_rules import adapter_rules
from kvds.config.alignment_rules import mode_rules
from kvds.config.all_settings import AllSettings
from kvds.config.batch_rules import batch_rules
from kvds.config.data_rules import data_rules
from kvds.config.deepspeed_file import load_deepspeed_config
from kvds.config.file_rules import file_rules, path_rules
from kvds.config.handoff_rules import handoff_rules
from kvds.config.loss_rules import collapse_warning, selection_rules, weight_rules
from kvds.config.on_policy_rules import on_policy_rules
from kvds.config.on_policy_settings import OnPolicySettings
from kvds.config.outcome_rules import outcome_rules, upload_rules
from kvds.config.outcome_settings import OutcomeSettings
from kvds.config.row_rules import row_rules
from kvds.config.setting_rules import Rule, check, setting_rules
from kvds.config.settings import AlignmentSettings, DataSettings, ModelSettings, OptimizationSettings, RunSettings
from kvds.config.teacher_rules import teacher_rules
from kvds.config.tracker_rules import reachable_tracker_rules, tracker_rules
from kvds.config.unread_settings import unread_rules, unread_warning
from kvds.config.values import parse_overrides, split_dataset_weight
from kvds.config.weight_settings import WeightSettings
from kvds.durable_files import write_durably

__all__ = ["SECTIONS", "AlignmentSettings", "RunConfig", "parse_overrides", "split_dataset_weight"]

SECTIONS = (
    ModelSettings, WeightSettings, DataSettings, AlignmentSettings, OnPolicySettings, OptimizationSettings,
    OutcomeSettings, RunSettings,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig(AllSettings):
    """All settings of a run. Construction checks each on its own and all together.

    Raises:
        InputError: naming the value, what was expected and the remedy.
    """

    def __post_init__(self) -> None:
        check(_rules(self))

    def check_before_start(self, given: Collection[str]) -> None:
        """Look at what a start asks for beyond the values: local files that the run will read, the way to what it will
        write to, and that what was given is read at all.

        Construction does not: a saved configuration must be readable later, on another machine.

        Args:
            given: Names of the settings that flags and recipe set.

        Raises:
            InputError: a file is missing, the DeepSpeed configuration cannot work, or a flag needs another.
        """
        load_deepspeed_config(self.deepspeed_config)
        check(path_rules(self))
        check(reachable_tracker_rules(self))
        check(upload_rules(self))
        check(unread_rules(self, given))

    @property
    def warnings(self) -> list[str]:
        """Settings that are allowed and known to be harmful, or that nothing reads."""
        return [text for text in (collapse_warning(self), unread_warning(self)) if text]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a recipe holds them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def save(self, path: str | Path) -> None:
        """Write the resolved configuration as a recipe that reproduces the run."""
        write_durably(Path(path), yaml.safe_dump(self.to_dict(), sort_keys=False))


def _rules(cfg: RunConfig) -> Iterator[Rule]:
    yield from setting_rules(cfg)
    for rules in (
        selection_rules,
        mode_rules,
        weight_rules,
        handoff_rules,
        on_policy_rules,
        batch_rules,
        data_rules,
        row_rules,
        teacher_rules,
        outcome_rules,
        file_rules,
        tracker_rules,
        adapter_rules,
    ):
        yield from rules(cfg)
