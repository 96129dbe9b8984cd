"""What transformers loads from a hub name or a folder, with failures told in the user's terms."""

from __future__ import annotations

import os
from typing import Any

from kvds.errors import InputError, one_line


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
        raise InputError(
            f"{flag}={name}: the {what} could not be loaded from the hub or its local cache ({reason}); without "
            f"internet, bring it where there is some (`kvds prefetch RECIPE --to DIR`, or `hf download {name} "
            "--local-dir FOLDER` and give the folder in place of the name)"
        ) from error
