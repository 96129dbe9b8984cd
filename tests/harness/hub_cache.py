"""A model folder as the hub's local cache holds a model that was once loaded by its name."""

import shutil
from pathlib import Path
from typing import Any


def make_hub_entry(folder: Path, cache: Path, name: str) -> None:
    """Lay ``folder`` into ``cache`` as the newest revision of the hub's ``OWNER/NAME``."""
    entry = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, entry / "snapshots/abc123")
    (entry / "refs").mkdir()
    (entry / "refs/main").write_text("abc123")


def hub_copy(folder: Path, cache: Path, name: str, monkeypatch: Any) -> str:
    """As :func:`make_hub_entry`, with ``cache`` as the hub's cache of this process; the name."""
    from huggingface_hub import constants
    from transformers.utils import hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    if hasattr(hub, "TRANSFORMERS_CACHE"):
        monkeypatch.setattr(hub, "TRANSFORMERS_CACHE", str(cache))
    make_hub_entry(folder, cache, name)
    return name
