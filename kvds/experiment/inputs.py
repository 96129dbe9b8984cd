"""Inputs of a run of an experiment, by content: what was trained on other bytes is no result of the same run.

Looked at before a run is started, so that what is trained already is known; a second look costs next to nothing
(:mod:`kvds.identity.file_digest`). Corpora of the hub and what is not on this machine are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvds.config import RunConfig
from kvds.config.values import split_dataset_weight
from kvds.data.corpora import CORPORA
from kvds.data.corpus_names import held_out_file, is_file, is_hub_name, is_own_file, own_file, split_names
from kvds.experiment.plan import PREPARED
from kvds.identity.contents import short_hash
from kvds.identity.file_digest import file_digests
from kvds.models.hub import folder_at_hand

_MODELS = ("model_name", "teacher_name", "student_name", "tokenizer_name")
# Of a model's folder: weights, configurations, tokenizers of every kind.
_MODEL_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")


def inputs_of(settings: dict[str, Any], prepared: Callable[[str], Path]) -> dict[str, str]:
    """What is read → a text that stands for its bytes.

    Args:
        settings: Of the run, ``prepared:NAME`` not yet replaced.
        prepared: Name of a prepared run → folder of its student.

    Raises:
        InputError: a file cannot be read.
    """
    cfg = RunConfig(**{**settings, "output_dir": "unset"})
    files: dict[str, list[Path]] = {f"deepspeed_config {cfg.deepspeed_config}": [Path(cfg.deepspeed_config)]}
    for spec in cfg.datasets:
        name = split_dataset_weight(spec)[0]
        files[f"datasets {name}"] = _data_files(name, cfg.data_dir)
    for flag, name in [*((flag, getattr(cfg, flag)) for flag in _MODELS),
                       *(("teacher_names", name) for name in cfg.teacher_names)]:  # fmt: skip
        if name:
            folder = prepared(name.removeprefix(PREPARED)) if name.startswith(PREPARED) else _folder(name)
            files[f"{flag} {name}"] = _model_files(folder)
    if cfg.chat_template is not None:
        files[f"chat_template {cfg.chat_template}"] = [Path(cfg.chat_template)]
    if cfg.teacher_cache is not None:
        files[f"teacher_cache {cfg.teacher_cache}"] = [Path(cfg.teacher_cache, "manifest.json")]
    here = {name: [path for path in paths if is_file(path)] for name, paths in files.items()}
    return {
        name: short_hash([[path.name, digest] for path, digest in zip(paths, file_digests(paths), strict=True)])
        for name, paths in here.items()
        if paths
    }


def _data_files(name: str, data_dir: str | None) -> list[Path]:
    if is_own_file(name):
        path = own_file(split_names(name)[0], data_dir)
        return sorted(path.rglob("*")) if path.is_dir() else [path, held_out_file(path)]
    if data_dir is None or name == "synthetic" or is_hub_name(name):
        return []
    members = ("arc_easy", "arc_challenge") if name == "arc" else (name,)
    return sorted({Path(data_dir, file) for member in members for file in CORPORA[member].files.values()})


def _folder(name: str) -> Path | None:
    return Path(name) if Path(name).is_dir() else folder_at_hand(name)


def _model_files(folder: Path | None) -> list[Path]:
    if folder is None or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES)
