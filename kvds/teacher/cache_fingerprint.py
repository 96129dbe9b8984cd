"""Fingerprint of a teacher cache: one made of something else is refused, with the difference named."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from kvds.align.loss import state_names
from kvds.config import RunConfig
from kvds.data.encoding import EncodedSample
from kvds.data.token_files import rows_identity
from kvds.errors import InputError
from kvds.identity.contents import architecture_identity, tokenizer_identity
from kvds.kv.states import KV_PARTS
from kvds.models.weights_identity import NOT_HERE, weights_identity

log = logging.getLogger("kvds")

# Raise it where a part comes to know more, or says it in another way.
_FORMAT = "2"


def cache_fingerprint(
    cfg: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedConfig,
    samples: Sequence[EncodedSample],
    dtype: str,
) -> dict[str, str]:
    """Name → text; where a cache and a run agree on all, the cache serves the run (``parts``: where it has those asked
    for). The teacher's weights are compared where they are here, as they are where a cache is written: a run that
    reads one does without.

    Args:
        cfg: The run.
        tokenizer: Of the run.
        teacher: The teacher's architecture.
        samples: The training rows as tokens, in the loader's numbering.
        dtype: That the teacher computes in, ``"bf16"`` or ``"fp32"``.
    """
    weights = weights_identity(
        cfg.first_teacher or "", init=cfg.teacher_init, seed=cfg.teacher_seed(), flag="--teacher_name", fetch=False
    )
    if weights == NOT_HERE:
        log.warning("--teacher_name=%s: its weights are not here; the cache is taken to be of them", cfg.first_teacher)
    parts = {
        "format": _FORMAT,
        "tokenizer": tokenizer_identity(tokenizer),
        "teacher architecture": architecture_identity(teacher),
        "teacher weights": weights,
        "teacher dtype": dtype,
        "data set": rows_identity(samples),
        "selection": f"{cfg.kv_method} {cfg.kv_budget} mask_first_token={cfg.mask_first_token}",
        "kv_rope": cfg.kv_rope,
        "parts": " ".join(state_names(cfg)),
    }
    return {name: text for name, text in parts.items() if text != NOT_HERE}


def parts_in(fingerprint: Mapping[str, str]) -> list[str]:
    """Of :data:`kvds.kv.states.KV_PARTS`, those that a cache holds or a run asks for."""
    return fingerprint.get("parts", " ".join(KV_PARTS)).split()


def check_fingerprint(
    found: dict[str, str], expected: dict[str, str], folder: Path, *, goes_on: bool = False
) -> None:  # fmt: skip
    """Compare a cache's fingerprint with a run's.

    Args:
        found: The cache's.
        expected: The run's.
        folder: The cache's, for the message.
        goes_on: More shards are to be written beside those that are there: parts that are left over are no more welcome
            than parts that are missing.

    Raises:
        InputError: naming what differs, in the cache and in the run.
    """
    if expected.get("format", "") != found.get("format", ""):
        raise InputError(
            f"teacher_cache={folder}: an earlier version wrote it, which did not look at every byte of the teacher; "
            "expected one of this version (kvds cache, into another folder, or leave --teacher_cache away)"
        )
    found = {**found, "parts": " ".join(parts_in(found))}
    for name in expected:
        if name == "parts" and not goes_on and set(parts_in(expected)) <= set(parts_in(found)):
            continue
        if found.get(name) != expected[name]:
            raise InputError(
                f"teacher_cache={folder}: its {name} is {found.get(name, 'not recorded')}, the run's {expected[name]}; "
                "expected a cache made with the run's own flags (kvds cache, or leave --teacher_cache away)"
            )
