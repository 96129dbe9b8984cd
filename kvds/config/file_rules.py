"""Rules of names, folders and files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from kvds.config.all_settings import AllSettings
from kvds.config.setting_rules import Rule
from kvds.config.values import DATA_SUFFIXES, parse_overrides, split_dataset_weight
from kvds.errors import InputError


def file_rules(cfg: AllSettings) -> Iterator[Rule]:
    """What must be given, and where the run can be written to.

    Raises:
        InputError: where the fault is no value that could be shown, but that there is none, or what lies there.
    """
    if cfg.data_dir is not None and not os.path.isdir(cfg.data_dir):
        raise InputError(f"data_dir={cfg.data_dir}: no such folder; expected the folder that holds gsm8k/, svamp/, …")
    if not cfg.output_dir:
        raise InputError("output_dir is empty; expected a folder to write the run to (--output_dir outputs/NAME)")
    there = os.path.exists(cfg.output_dir)
    yield not there or os.path.isdir(cfg.output_dir), "output_dir", cfg.output_dir, "a folder (this is a file)"
    if cfg.uses_teacher and not cfg.first_teacher:
        raise InputError(
            "--teacher_name is missing; expected a folder or a hub name (or --model_name, or --alignment_mode none)"
        )
    if not cfg.student:
        raise InputError("--student_name is missing; expected a folder or a hub name (or --model_name for both models)")
    for name, text in _texts(cfg, "overrides"):
        parse_overrides(text, flag=name)


def path_rules(cfg: AllSettings) -> Iterator[Rule]:
    """The local files that the run will read are there."""
    for name, model in _texts(cfg, "model"):
        # A hub name is NAME or OWNER/NAME: what is anchored or longer can only be a folder.
        if model[0] in "./~" or model.count("/") > 1:
            yield os.path.isdir(model), name, model, "an existing folder with a config.json (or a hub name)"
    if cfg.teacher_cache is not None:
        expected = "an existing folder written by `kvds cache` (or leave --teacher_cache away)"
        yield os.path.isdir(cfg.teacher_cache), "teacher_cache", cfg.teacher_cache, expected
    expected = "a folder, which need not be there yet (or --data_cache never)"
    yield not os.path.isfile(cfg.data_cache or ""), "data_cache", cfg.data_cache, expected
    template = cfg.chat_template
    expected = "an existing file with a Jinja template"
    yield template is None or os.path.isfile(template), "chat_template", template, expected
    for spec in cfg.datasets:
        name = split_dataset_weight(spec)[0]
        places = [Path(name), Path(cfg.data_dir or ".") / name]
        if name.endswith(DATA_SUFFIXES):
            there = os.path.exists if name.endswith(".parquet") else os.path.isfile  # Spark's parquet is a folder
            expected = "an existing file of rows (see --data_format), also below --data_dir"
            yield any(map(there, places)), "datasets", spec, expected
        elif name.startswith(("./", "../", "/", "~")):
            places = [Path(str(place).rpartition("@")[0] or place) for place in places] + places
            expected = f"an existing folder of data, or a file of {', '.join(DATA_SUFFIXES)} (or OWNER/NAME of the hub)"
            yield any(map(os.path.isdir, places)), "datasets", spec, expected
    if cfg.resume not in ("auto", "never"):
        yield os.path.isdir(cfg.resume), "resume", cfg.resume, "auto, never or the folder of a run (--resume auto)"


def _texts(cfg: AllSettings, form: str) -> Iterator[tuple[str, str]]:
    """Settings whose texts have this form, and each text that is given."""
    for field in dataclasses.fields(cfg):
        if field.metadata["form"] == form:
            value = getattr(cfg, field.name)
            yield from ((field.name, text) for text in (value if isinstance(value, tuple) else (value,)) if text)
