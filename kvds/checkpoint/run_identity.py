"""Identity of a run, by content: models, tokenizer, rows, seed; a checkpoint of another run is not gone on from.

Folders and files may have moved and hub names may have become folders: what they hold is compared.
"""

from __future__ import annotations

import logging

from transformers import PreTrainedTokenizerBase

from kvds.checkpoint.folder import step_tag
from kvds.checkpoint.origin import Origin
from kvds.config import RunConfig
from kvds.config.values import split_dataset_weight
from kvds.data.corpus_names import is_own_file
from kvds.data.run_data import RunData
from kvds.data.token_files import rows_identity
from kvds.errors import InputError
from kvds.identity.contents import architecture_identity, differences, tokenizer_identity
from kvds.models.adapters import adapter_config, adapter_identity
from kvds.models.architecture import ModelConfigs
from kvds.models.weights_identity import NOT_HERE, weights_identity

log = logging.getLogger("kvds")

_HELD_OUT, _TRAINING = "held-out rows", "training rows"


def run_identity(
    cfg: RunConfig,
    *,
    tokenizer: PreTrainedTokenizerBase,
    models: ModelConfigs,
    data: RunData,
    fetch: bool = True,
) -> dict[str, str]:
    """Part of the run → a text that stands for all it holds.

    Args:
        cfg: The run.
        tokenizer: Of the run.
        models: Architectures of student and teachers.
        data: Its rows.
        fetch: Bring weights from the hub, as the run is about to. Those that are not here, as a teacher's need not
            be where its cache is read, are left out.

    Raises:
        InputError: a file cannot be read.
    """
    held_out = () if data.eval_loader is None else data.eval_loader.samples

    def weights(name: str | None, init: str, seed: int, flag: str, *, read: bool = True) -> str:
        return weights_identity(name or "", init=init, seed=seed, flag=flag, fetch=fetch and read)

    parts = {
        "seed": str(cfg.seed),
        "tokenizer": tokenizer_identity(tokenizer),
        _TRAINING: rows_identity(data.loader.samples),
        _HELD_OUT: rows_identity(held_out),
        "student architecture": architecture_identity(models.student),
        "student weights": weights(cfg.student, cfg.student_init, cfg.seed, "--student_name"),
    }
    if (adapters := adapter_config(cfg)) is not None:
        parts["student adapters"] = adapter_identity(adapters)
    for number, config in enumerate(models.teachers):
        who = "teacher" if len(models.teachers) == 1 else f"teacher {number + 1}"
        parts[f"{who} architecture"] = architecture_identity(config)
        parts[f"{who} weights"] = weights(
            cfg.all_teachers[number], cfg.teacher_init, cfg.teacher_seed(number), "--teacher_name",
            read=cfg.teacher_cache is None,
        )  # fmt: skip
    return {name: text for name, text in parts.items() if text != NOT_HERE}


def check_identity(cfg: RunConfig, origin: Origin, step: int, now: dict[str, str]) -> dict[str, str]:
    """Compare a run with the one that saved the checkpoint after ``step`` optimizer steps.

    Held-out rows may change, as ``--eval_subset_size`` may: that is told. A checkpoint that knows of no identity is
    gone on from, with a warning.

    Returns:
        What later checkpoints of the run say: of weights that are not here now, what the one before said.

    Raises:
        InputError: naming what differs, what it was and what it is.
    """
    place = f"{step_tag(step)} in {cfg.output_dir}"
    if origin.identity is None:
        log.warning(
            "%s was saved by an earlier version and does not say of which weights, tokenizer and rows: they are taken "
            "for the same", place,
        )  # fmt: skip
        return now
    found = differences(origin.identity, now)
    hint = _drawn_otherwise(cfg) if _TRAINING in found else ""
    if _HELD_OUT in found:
        before, text = found.pop(_HELD_OUT)
        told = f"held-out rows: {text} now, {before} up to {step_tag(step)}"
        log.warning("%s: evaluations from here on are of other rows", told)
    for part, (before, text) in found.items():
        raise InputError(
            f"{_named_by(cfg, part)}: the {part} now: {text}; {place} was trained with: {before}; expected the same "
            f"contents, in whatever place (bring them back, or --resume never, or another --output_dir){hint}"
        )
    return {**origin.identity, **now}


def _drawn_otherwise(cfg: RunConfig) -> str:
    """What else than another content may have made other rows to train on."""
    own = any(is_own_file(split_dataset_weight(spec)[0]) for spec in cfg.datasets)
    return "; which rows are drawn of a file follows from its name, too" if own and cfg.subset_size else ""


def _named_by(cfg: RunConfig, part: str) -> str:
    """The flag and value that a part of the run follows from."""
    whose = part.split()[0]
    if whose == "student":
        return f"--student_name={cfg.student}"
    if whose == "teacher":
        number = part.split()[1]
        several = number.isdecimal()
        return f"--teacher_name{'s' if several else ''}={cfg.all_teachers[int(number) - 1 if several else 0]}"
    if whose == "tokenizer":
        return f"--tokenizer_name={cfg.tokenizer_name or 'none'}"
    return f"--seed={cfg.seed}" if whose == "seed" else f"--datasets={' '.join(cfg.datasets)}"
