"""The one tokenizer of a run, and the checks that models and tokenizer fit each other."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from kvds.config import RunConfig
from kvds.errors import InputError
from kvds.models.hub import from_hub, hub_fault, is_folder_name

log = logging.getLogger("kvds")

# One of these lies in every folder that brings a tokenizer, whatever its kind.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")


def tokenizer_of(name: str, flag: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, which ``flag`` gave.

    Raises:
        InputError: there is none, or it cannot be loaded.
    """
    tokenizer = from_hub(AutoTokenizer, name, "tokenizer", flag)
    # From a config.json alone transformers makes a tokenizer that knows its special tokens and not one word.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise InputError(
            f"{flag}={name}: holds no tokenizer; expected tokenizer.json there, or --tokenizer_name FOLDER"
        )
    return tokenizer


def load_tokenizer(cfg: RunConfig) -> PreTrainedTokenizerBase:
    """The one tokenizer of a run: ``--tokenizer_name``, else the teacher's, else the student's; with the chat template
    that ``--chat_template`` names, which a student keeps.
    """
    tokenizer = _tokenizer(cfg)
    if cfg.chat_template is not None:
        tokenizer.chat_template = read_chat_template(cfg.chat_template)
    return tokenizer


def read_chat_template(path: str | Path) -> str:
    """The text of a template's file.

    Raises:
        InputError: it cannot be read, or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"chat_template={path}: {error}; expected a file with a Jinja template") from error
    if not text.strip():
        raise InputError(f"chat_template={path}: is empty; expected a Jinja template (or leave --chat_template away)")
    return text


def _tokenizer(cfg: RunConfig) -> PreTrainedTokenizerBase:
    if cfg.tokenizer_name is not None:
        return tokenizer_of(cfg.tokenizer_name, "--tokenizer_name")
    teacher = cfg.first_teacher if cfg.uses_teacher else None
    flags = {name: flag for flag, name in (("--student_name", cfg.student), (_teacher_flag(cfg), teacher)) if name}
    names = [name for name in dict.fromkeys((teacher, cfg.student)) if name]
    faults = []
    for name in names:
        if os.path.isdir(name) and not _brings_one(name):
            continue
        try:
            return tokenizer_of(name, flags[name])
        except InputError as error:  # the other model may bring one; if not, this is why
            faults.append(error)
    if faults:
        raise faults[0]
    if names:
        raise InputError(
            f"--tokenizer_name is not given and {' and '.join(names)} hold no tokenizer; expected --tokenizer_name "
            "FOLDER"
        )
    raise InputError("--model_name or --student_name is missing; expected a folder or a hub name")


def _teacher_flag(cfg: RunConfig) -> str:
    return "--teacher_names" if cfg.teacher_names else "--teacher_name"


def _brings_one(folder: str) -> bool:
    return any(file for pattern in _TOKENIZER_FILES for file in Path(folder).glob(pattern))


def _brought_by(name: str, flag: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model's own folder or of the hub's copy; None where it brings none."""
    if is_folder_name(name):
        return tokenizer_of(name, flag) if _brings_one(name) else None
    try:
        return tokenizer_of(name, flag)
    except InputError as error:
        place = f"{flag}={name}: has no tokenizer at hand" if hub_fault() else error  # told by then
        log.warning("%s: its vocabulary is not compared with the run's; its size alone is", place)
        return None


def check_same_tokenizer(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Positions correspond one to one only where both models read the same ids: refuse models that bring other
    vocabularies.
    """
    teachers = [(_teacher_flag(cfg), name) for name in cfg.all_teachers] if cfg.uses_teacher else []
    for flag, name in (*teachers, ("--student_name", cfg.student)):
        own = None if name is None else _brought_by(name, flag)
        if own is not None and own.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"{flag}={name}: its tokenizer ({len(own)} entries) differs from the run's ({len(tokenizer)} "
                "entries); expected teacher and student of one vocabulary, since keys and values are matched "
                "position by position"
            )


def check_vocabulary(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, *, flag: str, option: str = ""
) -> None:
    """A model may pad its vocabulary, but must have a row for each token; ``option`` as in
    :func:`kvds.models.architecture.load_config`.
    """
    rows, largest = int(config.vocab_size), max(tokenizer.get_vocab().values())
    if rows <= largest and flag == "model":  # as it is on disk: nothing but the tokenizer can be another
        raise InputError(
            f"{option or '--model_name'}: vocab_size {rows} has no row for token id {largest} of the tokenizer; "
            "expected the tokenizer that the model was trained with"
        )
    if rows <= largest:
        raise InputError(
            f"--{flag}_name: vocab_size {rows} has no row for token id {largest} of the tokenizer; expected vocab_size "
            f"> {largest} (another --tokenizer_name, or --{flag}_config_overrides vocab_size={largest + 1} with "
            f"--{flag}_init random)"
        )
