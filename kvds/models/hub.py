"""Hub names and folders: what transformers loads from them, with failures told in the user's terms."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvds.errors import InputError, one_line
from kvds.models.weight_files import WEIGHT_PATTERNS, weight_parts


def is_folder_name(name: str) -> bool:
    """Whether ``name`` is meant as a folder of this machine, not as a hub name."""
    return os.path.exists(name) or name.startswith((".", "/", "~"))


def from_hub(loader: Any, name: str, what: str, flag: str, **kwargs: Any) -> Any:
    """``loader.from_pretrained`` with failures told in the user's terms. Remote code is never run."""
    if is_folder_name(name) and not os.path.isdir(name):
        raise InputError(f"{flag}={name}: no such folder; expected a local folder with a {what}, or a hub name")
    try:
        return loader.from_pretrained(name, trust_remote_code=False, **kwargs)
    except RuntimeError as error:
        if isinstance(error, RecursionError):
            raise InputError(
                f"{flag}={name}: its {what} nests too deep; expected what save_pretrained writes"
            ) from error
        raise  # shapes that do not fit, or no memory: the caller knows what that means
    except Exception as error:  # each reader of a damaged file raises another kind
        reason = one_line(error)
        if is_folder_name(name):
            raise InputError(
                f"{flag}={name}: the folder holds no loadable {what} ({reason}); expected the files that "
                f"save_pretrained writes"
            ) from error
        raise _not_on_the_hub(name, what, flag, reason) from error


def _not_on_the_hub(name: str, what: str, flag: str, reason: str) -> InputError:
    return InputError(
        f"{flag}={name}: the {what} could not be loaded from the hub or its local cache ({reason}); without "
        f"internet, bring it where there is some (`kvds prefetch RECIPE --to DIR`, or `hf download {name} "
        "--local-dir FOLDER` and give the folder in place of the name)"
    )


def model_folder(name: str, flag: str) -> Path:
    """The folder of a model with weights: ``name`` itself, or where the hub's cache has it once it is downloaded."""
    if is_folder_name(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*WEIGHT_PATTERNS, "*.json"]))
    except Exception as error:  # the hub's client raises a dozen kinds
        raise _not_on_the_hub(name, "model with weights", flag, one_line(error)) from error


def folder_at_hand(name: str) -> Path | None:
    """The folder of a model as far as it can be had without a network; None where its weights are not here."""
    if is_folder_name(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        weight_parts(folder)
    except Exception:  # as above; whoever loads it will say why
        return None
    return folder
