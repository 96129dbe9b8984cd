"""How a student generates: one place for what its folder asks for and for that by which it is judged.

Rows end with the end token of the run's tokenizer, so that token ends a text, beside the end tokens of the model that
the student was made of where the tokenizer has them. Training settings (no cache of keys and values) are not left
behind; the source's ``generation_config.json`` is, with its sampling.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from kvds.errors import InputError, one_line

log = logging.getLogger("kvds")

GENERATION_FILE = "generation_config.json"


def source_generation(name: str) -> GenerationConfig | None:
    """What ``generation_config.json`` says in a model's folder, or in the cache of its hub name; None where there is
    none here. That it can be read has been seen to by :func:`check_generation`.
    """
    try:
        return GenerationConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):  # a model without weights need not have one
        return None


def check_generation(folder: Path, place: str) -> None:
    """Refuse a ``generation_config.json`` that cannot be read: transformers would take its own defaults in its place,
    without a word, and end tokens and sampling would be lost.

    Args:
        folder: Of a model.
        place: What the user gave, for messages.

    Raises:
        InputError: it is there and damaged.
    """
    if not (folder / GENERATION_FILE).is_file():
        return
    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True).validate()
    except Exception as error:  # damaged JSON, a list, a text for a number: each is another kind
        raise InputError(
            f"{place}: {GENERATION_FILE} cannot be used ({one_line(error)[:200]}); expected the file as its publisher "
            "has it, or none"
        ) from error


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a text: the tokenizer's own first, then those of the model that the tokenizer adds to its words.

    A model's ids may belong to another vocabulary, in which the same number is a word or the beginning of a text.
    """
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    special -= {tokenizer.bos_token_id, tokenizer.unk_token_id}
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for source in (model.generation_config, model.config.get_text_config()):
        ends = getattr(source, "eos_token_id", None)
        for token in ends if isinstance(ends, list | tuple) else [ends]:
            if token in special and token not in own:
                own.append(token)
    return own


def _beginning(model: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The tokenizer's token for the beginning of a text, else the model's where the tokenizer has it."""
    own, theirs = tokenizer.bos_token_id, model.generation_config.bos_token_id
    return theirs if own is None and theirs in tokenizer.added_tokens_decoder else own


def greedy_generation(model: Any, tokenizer: PreTrainedTokenizerBase, **limits: int) -> GenerationConfig:
    """What a model is judged by: the likeliest token each time, until one of :func:`end_tokens`.

    ``generate`` fills every value that its caller leaves open from the model's own defaults, such as sampling and
    repetition penalty: this takes their place.
    """
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        **limits, do_sample=False, num_beams=1, use_cache=True, eos_token_id=ends or None,
        pad_token_id=ends[0] if pad is None and ends else pad, bos_token_id=_beginning(model, tokenizer),
    )  # fmt: skip


def fit_generation(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int | None = None
) -> GenerationConfig:
    """Make ``model.config`` and ``model.generation_config`` those of a student that plain ``generate()`` is called on.

    Args:
        model: Its generation settings are the source's; its own afterwards.
        tokenizer: That its rows were made with.
        max_new_tokens: Which it was judged with, for a source that sets no limit: transformers' would be 20 tokens.

    Returns:
        ``model.generation_config``.
    """
    judged, found = greedy_generation(model, tokenizer), model.generation_config
    fitted = GenerationConfig() if found._from_model_config else copy.deepcopy(found)
    ends, pad = judged.eos_token_id or [], judged.pad_token_id
    fitted.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    fitted.pad_token_id, fitted.bos_token_id, fitted.use_cache = pad, judged.bos_token_id, True
    if max_new_tokens is not None and fitted.max_length is None and fitted.max_new_tokens is None:
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and max_new_tokens >= positions:
            fitted.max_length = positions  # prompt and all: as many as it was judged with, and none that it lacks
        else:
            fitted.max_new_tokens = max_new_tokens
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.eos_token_id, config.bos_token_id, config.use_cache = fitted.eos_token_id, fitted.bos_token_id, True
        # The embedding of a configuration's padding token gets no gradient: no end token is made one.
        config.pad_token_id = None if pad in ends and config.pad_token_id != pad else pad
    model.generation_config = fitted
    if fitted.do_sample or (fitted.num_beams or 1) > 1:
        how = ", ".join(
            f"{name}={value}"
            for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams")
            if (value := getattr(fitted, name, None)) is not None
        )
        log.warning(
            "student/%s has %s, as its source's had: generate() draws, and the student was judged by its likeliest "
            "tokens (do_sample=False repeats that)", GENERATION_FILE, how,
        )  # fmt: skip
    return fitted
