"""Identity of a tokenizer and an architecture: a short text of what they do, the same wherever they lie.

What they mean counts, so that line breaks and the order of keys in their files do not. Of weights and rows, every byte
and every token counts (:mod:`kvds.models.weights_identity`, :func:`kvds.data.token_files.rows_identity`). All that
rests on what a run is made of asks here: checkpoints to go on from, teacher caches, token files, experiments.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kvds.durable_files import json_text
from kvds.identity.file_digest import file_digests

# What changes with the version of transformers, or is a run's own choice.
_NOT_ARCHITECTURE = {
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"),
}
# What each call of a tokenizer sets anew.
_NOT_TOKENIZER = {"truncation", "padding"}


def short_hash(value: Any) -> str:
    """16 hexadecimal digits of a value that JSON can hold."""
    return hashlib.sha256(json_text(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tokenizer_identity(tokenizer: Any) -> str:
    """All that a tokenizer does to a text: vocabulary, merges, normalisation, splitting, added and ending tokens."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state = {name: part for name, part in state.items() if name not in _NOT_TOKENIZER}
    else:
        own = getattr(tokenizer, "vocab_file", None)
        files = file_digests([Path(own)]) if own and Path(own).is_file() else []
        state = {"kind": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "files": files}
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return f"{len(tokenizer)} entries {short_hash([state, ends])}"


def architecture_identity(config: Any) -> str:
    """What a model's configuration, overrides applied, says of its computation."""
    own = {name: value for name, value in config.to_diff_dict().items() if name not in _NOT_ARCHITECTURE}
    return f"{config.model_type} {short_hash(own)}"


def differences(before: dict[str, str], now: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Name → (before, now) of what is known of both and differs."""
    return {name: (before[name], text) for name, text in now.items() if before.get(name, text) != text}
