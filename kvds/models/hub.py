"""Hub names and folders: what transformers loads from them, with failures told in the user's terms."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

from kvds.errors import InputError, one_line
from kvds.models.weight_files import WEIGHT_PATTERNS, weight_parts

log = logging.getLogger("kvds")
_ANSWER_SECONDS = 10.0


def is_folder_name(name: str) -> bool:
    """Whether ``name`` is meant as a folder of this machine, not as a hub name."""
    return os.path.exists(name) or name.startswith((".", "/", "~"))


def from_hub(loader: Any, name: str, what: str, flag: str, **kwargs: Any) -> Any:
    """``loader.from_pretrained`` with failures told in the user's terms. Remote code is never run."""
    if is_folder_name(name) and not os.path.isdir(name):
        raise InputError(f"{flag}={name}: no such folder; expected a local folder with a {what}, or a hub name")
    if not is_folder_name(name) and hub_fault():
        kwargs["local_files_only"] = True  # each file would be asked for five times, in half a minute
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


@functools.cache
def hub_fault() -> str:
    """Why the hub cannot be asked, found out and told once per process; empty where it answers."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_ANSWER_SECONDS)
    except Exception as error:  # as each version's client calls it
        fault = f"{constants.ENDPOINT} cannot be reached: {one_line(error)}"
        log.warning("%s; what the hub's local cache holds is used", fault)
        return fault
    return ""


def _absence(name: str, reason: str) -> str:
    """Why a hub name cannot be had: the loaders' own words do not say whether anybody could be asked."""
    from huggingface_hub import constants

    fault, cache = hub_fault(), constants.HF_HUB_CACHE
    if not fault:
        return reason
    here = os.path.isdir(os.path.join(cache, f"models--{name.replace('/', '--')}"))
    return f"{fault}, and {cache} " + (f"has it in part: {reason}" if here else "holds nothing of it")


def _not_on_the_hub(name: str, what: str, flag: str, reason: str) -> InputError:
    reason = _absence(name, reason)
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
        wanted = [*WEIGHT_PATTERNS, "*.json"]
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=bool(hub_fault())))
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
