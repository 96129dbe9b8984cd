"""Run configuration: all settings of a run, checked each and together. Knows no file format and no model."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.alignment_rules import mode_rules
from kvds.config.all_settings import AllSettings
from kvds.config.deepspeed_file import load_deepspeed_config
from kvds.config.row_rules import row_rules
from kvds.config.selection_methods import SELECTION_METHODS
from kvds.config.setting_rules import range_rules
from kvds.config.settings import AlignmentSettings, DataSettings, ModelSettings, OptimizationSettings, RunSettings
from kvds.config.teacher_rules import teacher_rules
from kvds.config.values import number, parse_overrides, split_dataset_weight
from kvds.durable_files import write_durably
from kvds.errors import InputError, near_miss, one_line

__all__ = ["SECTIONS", "AlignmentSettings", "RunConfig", "parse_overrides", "split_dataset_weight"]

SECTIONS = (ModelSettings, DataSettings, AlignmentSettings, OptimizationSettings, RunSettings)


@dataclass(frozen=True, kw_only=True)
class RunConfig(AllSettings):
    """All settings of a run. Construction checks each on its own and all together.

    Raises:
        InputError: naming the value, what was expected and the remedy.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_type(field, getattr(self, field.name))
        for rule in range_rules(self):
            require(*rule)
        self._check_datasets()
        self._check_alignment()
        self._check_step()
        for rule in teacher_rules(self):
            require(*rule)
        self._check_files()

    def _check_datasets(self) -> None:
        require(bool(self.datasets), "datasets", "", "at least one corpus, such as --datasets gsm8k")
        names = [split_dataset_weight(spec)[0] for spec in self.datasets]
        for name in names:
            require(names.count(name) == 1, "datasets", name, f"each corpus once (to weigh it: {name}:2)")

    def _check_alignment(self) -> None:
        _require_weight(self.kv_weight)
        budget, method = self.kv_budget, SELECTION_METHODS[self.kv_method]
        if isinstance(budget, float):
            require(0 < budget <= 1, "kv_budget", budget, "a fraction in (0, 1], or a whole number of tokens")
        elif budget is not None:
            require(budget >= 1, "kv_budget", budget, "at least 1 token, or a fraction in (0, 1] (or --kv_method full)")
        if not method.budget:
            expected = f"no budget with --kv_method {self.kv_method} (or --kv_method right_crop)"
            require(budget is None, "kv_budget", budget, expected)
        else:
            require(
                budget is not None,
                "kv_budget",
                budget,
                f"a number of tokens or a fraction with --kv_method {self.kv_method}",
            )
        for rule in mode_rules(self):
            require(*rule)
        if method.keeps_window and isinstance(budget, int):
            window = self.observing_tokens or method.observing_tokens
            expected = f"more tokens than the {window} observing ones, all of which are kept (--observing_tokens)"
            require(budget > window, "kv_budget", budget, expected)
        if self.kv_weight_held:
            expected = "constant with --kv_weight hold:SHARE, which moves the weight itself"
            require(self.kv_weight_schedule == "constant", "kv_weight_schedule", self.kv_weight_schedule, expected)
        aligned, frozen = ALIGNMENT_MODES[self.alignment_mode].aligned, self.aligner_update == "frozen"
        require(
            not (aligned and frozen and self.map_start == "random"),
            "aligner_update",
            "frozen",
            "--map_start pca, procrustes or ridge: a frozen random map has no meaning",
        )
        alone = self.uses_kv and self.teacher_kv == "shuffled" and self.batch_size == 1
        require(not alone, "teacher_kv", "shuffled", "a --batch_size above 1: a row alone has no other to borrow from")
        silent = self.task_weight == 0 and not self.uses_teacher
        require(
            not silent,
            "task_weight",
            0,
            "some loss to train on (--task_weight 1, or an alignment with --kv_weight above 0)",
        )
        auto_without_task = self.task_weight == 0 and self.uses_kv and self.kv_weight_share is not None
        require(
            not auto_without_task,
            "kv_weight",
            self.kv_weight,
            "a number when --task_weight is 0: there is no task gradient to take a share of",
        )

    def _check_step(self) -> None:
        remedy = f"1 (rows as long as the longest of a batch) to max_length={self.max_length}; such as 64"
        require(1 <= self.pad_to_multiple_of <= self.max_length, "pad_to_multiple_of", self.pad_to_multiple_of, remedy)
        for rule in row_rules(self):
            require(*rule)
        if self.teacher_cache is not None:
            self.check_cacheable(self.teacher_cache)
        remedy = "--gradient_checkpointing, whose layer inputs it moves (or --no_checkpoint_offload)"
        require(self.gradient_checkpointing or not self.checkpoint_offload, "checkpoint_offload", True, remedy)

    def check_cacheable(self, folder: str | Path) -> None:
        """Refuse what a cache of one teacher's keys and values, at positions known without it, cannot serve.

        Raises:
            InputError: naming ``folder``, the flag that reads more, and what.
        """
        mode, method = ALIGNMENT_MODES[self.alignment_mode], SELECTION_METHODS[self.kv_method]
        for found, flag in (
            (self.logit_kd_weight > 0, "--logit_kd_weight: a cache holds keys and values, no logits"),
            (method.draws, f"--kv_method {self.kv_method}, which draws other positions in each step"),
            (method.reads_keys, f"--kv_method {self.kv_method}, which reads the teacher's keys to choose"),
            (not mode.takes_kv, f"--alignment_mode {self.alignment_mode}: a cache holds keys and values"),
            (self.align_tokens == "segment", "--align_tokens segment: a cache holds positions"),
            (self.teacher_kv == "shuffled", "--teacher_kv shuffled, which exchanges whole rows"),
            (bool(self.teacher_names), "--teacher_names: a cache is that of one teacher"),
        ):
            require(not found, "teacher_cache", str(folder), f"no --teacher_cache with {flag}")

    def _check_files(self) -> None:
        if self.data_dir is not None and not os.path.isdir(self.data_dir):
            raise InputError(
                f"data_dir={self.data_dir}: no such folder; expected the folder that holds gsm8k/, svamp/, …"
            )
        if not self.output_dir:
            raise InputError("output_dir is empty; expected a folder to write the run to (--output_dir outputs/NAME)")
        if os.path.exists(self.output_dir) and not os.path.isdir(self.output_dir):
            raise InputError(f"output_dir={self.output_dir}: is a file; expected a folder")
        if self.uses_teacher and not self.teacher:
            raise InputError(
                "--teacher_name is missing; expected a folder or a hub name (or --model_name, or --alignment_mode none)"
            )
        if not self.student:
            raise InputError(
                "--student_name is missing; expected a folder or a hub name (or --model_name for both models)"
            )
        for name, text in self._of_form("overrides"):
            parse_overrides(text, flag=name)
        uri = self.tracking_uri
        folder = uri is not None and uri != "databricks" and ("://" not in uri or uri.startswith("file:"))
        remedy = "sqlite:///FILE.db or http(s)://SERVER, as MLflow writes to no folder (unset: OUTPUT_DIR/mlflow.db)"
        require(not folder, "tracking_uri", uri, remedy)

    def _of_form(self, form: str) -> Iterator[tuple[str, str]]:
        """Settings whose texts have this form, and each text that is given."""
        for field in dataclasses.fields(self):
            if field.metadata["form"] == form:
                value = getattr(self, field.name)
                texts = value if isinstance(value, tuple) else (value,)
                yield from ((field.name, text) for text in texts if text)

    def check_paths(self) -> None:
        """Look at the local files that the run will read, before anything is loaded.

        Construction does not: a saved configuration must be readable on another machine.

        Raises:
            InputError: one is missing, or the DeepSpeed configuration cannot work.
        """
        load_deepspeed_config(self.deepspeed_config)
        for name, value in self._of_form("model"):
            # A hub name is NAME or OWNER/NAME: what is anchored or longer can only be a folder.
            if value[0] in "./~" or value.count("/") > 1:
                require(os.path.isdir(value), name, value, "an existing folder with a config.json (or a hub name)")
        if self.teacher_cache is not None:
            expected = "an existing folder written by `kvds cache` (or leave --teacher_cache away)"
            require(os.path.isdir(self.teacher_cache), "teacher_cache", self.teacher_cache, expected)
        expected = "a folder, which need not be there yet (or --data_cache never)"
        require(not os.path.isfile(self.data_cache or ""), "data_cache", self.data_cache, expected)
        for spec in self.datasets:
            file = Path(split_dataset_weight(spec)[0])
            if file.suffix in (".json", ".jsonl"):
                found = any(os.path.isfile(folder / file) for folder in (Path(), Path(self.data_dir or ".")))
                require(found, "datasets", spec, "an existing JSONL file (rows with prompt, rationale, answer)")
        if self.resume not in ("auto", "never"):
            require(
                os.path.isdir(self.resume), "resume", self.resume, "auto, never or the folder of a run (--resume auto)"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a recipe holds them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def save(self, path: str | Path) -> None:
        """Write the resolved configuration as a recipe that reproduces the run."""
        write_durably(Path(path), yaml.safe_dump(self.to_dict(), sort_keys=False))


def require(holds: bool, name: str, value: Any, expected: str, place: str = "") -> None:
    """Say what a setting was expected to be, and how to get there, unless it ``holds``."""
    if not holds:
        shown = "true" if value is True else "false" if value is False else "none" if value is None else one_line(value)
        remedy = "" if "(" in expected or "--" in expected else f" ({_way_back(name)})"
        raise InputError(f"{place}{name}={shown}: expected {expected}{remedy}")


def _way_back(name: str) -> str:
    [default] = [field.default for field in dataclasses.fields(RunConfig) if field.name == name]
    if default is dataclasses.MISSING:
        return f"for example --{name} outputs/NAME"
    text = " ".join(default) if isinstance(default, tuple) else "none" if default is None else str(default)
    return f"the default is --{name} {text or repr(text)}"


def _require_weight(value: str | float) -> None:
    if isinstance(value, str):
        head, _, share = value.partition(":")
        value_of_share = number(share)
        holds = head in ("auto", "hold") and isinstance(value_of_share, int | float) and 0 < value_of_share < math.inf
    else:
        holds = math.isfinite(value) and value >= 0
    require(holds, "kv_weight", value, "a number of at least 0, or auto:SHARE such as auto:2.0, or hold:SHARE")


_KIND_NAMES = {
    int: "a whole number", float: "a number", str: "a text, in a recipe quoted", bool: "true or false",
    tuple: "a list of texts", types.NoneType: "nothing",
}  # fmt: skip


@functools.cache
def hints() -> dict[str, Any]:
    """Types of all settings by name."""
    return typing.get_type_hints(RunConfig)


def check_type(field: dataclasses.Field[Any], value: Any, place: str = "") -> None:
    """Check kind, range and choices of one setting's value; ``place`` stands in front of the message."""
    hint = hints()[field.name]
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in allowed)
    widened = (*kinds, int) if float in kinds else kinds
    wrong_bool = isinstance(value, bool) and bool not in kinds
    names = " or ".join(_KIND_NAMES[kind] for kind in kinds)
    require(isinstance(value, widened) and not wrong_bool, field.name, value, names, place)
    if isinstance(value, int | float):
        require(abs(value) < 2**63, field.name, value, "a finite number", place)
    if kinds == (tuple,) and typing.get_args(hint)[0] is float:
        numbers = all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in value)
        require(numbers, field.name, " ".join(map(one_line, value)), "numbers", place)
        return
    texts = value if isinstance(value, tuple) else (value,) if isinstance(value, str) and value else ()
    readable = all(isinstance(text, str) and text.strip() and text.isprintable() for text in texts)
    require(readable, field.name, value, "visible text on one line", place)
    choices = field.metadata.get("choices")
    if choices and value is not None and value not in choices:
        require(False, field.name, value, f"one of {', '.join(choices)}{near_miss(value, choices)}", place)
