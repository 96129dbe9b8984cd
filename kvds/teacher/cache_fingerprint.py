"""Fingerprint of a teacher cache: one made of something else is refused, with the difference named."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from kvds.align.loss import state_names
from kvds.config import RunConfig
from kvds.data.encoding import EncodedSample
from kvds.durable_files import json_text
from kvds.errors import InputError
from kvds.kv.states import KV_PARTS

# What of a weight file is hashed: enough to tell two trainings apart without reading gigabytes.
_EDGE = 2**20


def cache_fingerprint(
    cfg: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedConfig,
    samples: Sequence[EncodedSample],
    dtype: str,
) -> dict[str, str]:
    """Name → text; where a cache and a run agree on all, the cache serves the run (``parts``: where it has those asked
    for).

    Args:
        cfg: The run.
        tokenizer: Of the run.
        teacher: The teacher's architecture.
        samples: The training rows as tokens, in the loader's numbering.
        dtype: That the teacher computes in, ``"bf16"`` or ``"fp32"``.
    """
    rows = hashlib.sha256()
    for sample in samples:
        rows.update(json_text([sample.input_ids, sample.segment_ids]).encode())
    own = {
        key: value for key, value in teacher.to_dict().items() if key not in ("_name_or_path", "transformers_version")
    }
    return {
        "tokenizer": f"{len(tokenizer)} entries {_short(tokenizer.get_vocab())}",
        "teacher architecture": f"{teacher.model_type} {_short(own)}",
        "teacher weights": _weights(cfg, teacher),
        "teacher dtype": dtype,
        "data set": f"{len(samples)} rows {rows.hexdigest()[:16]}",
        "selection": f"{cfg.kv_method} {cfg.kv_budget} mask_first_token={cfg.mask_first_token}",
        "kv_rope": cfg.kv_rope,
        "parts": " ".join(state_names(cfg)),
    }


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
    found = {**found, "parts": " ".join(parts_in(found))}
    for name in expected:
        if name == "parts" and not goes_on and set(parts_in(expected)) <= set(parts_in(found)):
            continue
        if found.get(name) != expected[name]:
            raise InputError(
                f"teacher_cache={folder}: its {name} is {found.get(name, 'not recorded')}, the run's {expected[name]}; "
                "expected a cache made with the run's own flags (kvds cache, or leave --teacher_cache away)"
            )


def _short(value: Any) -> str:
    return hashlib.sha256(json_text(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _weights(cfg: RunConfig, config: Any) -> str:
    if cfg.teacher_init == "random":
        return f"random, seed {cfg.teacher_seed()}"
    folder = Path(cfg.first_teacher or "")
    if not folder.is_dir():
        return f"{cfg.first_teacher} {getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(0, size - _EDGE))
            digest.update(file.read())
    return f"files {digest.hexdigest()[:16]}"
