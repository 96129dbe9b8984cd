"""``map_aligner.pt``: the learned map with its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvds.align import AlignerGroup, KVAligner, aligner_from_config_dict
from kvds.durable_files import UNFINISHED, put_in_place
from kvds.errors import InputError

ALIGNER_FILE = "map_aligner.pt"
ALIGNER_START_FILE = "map_aligner_start.pt"


def save_aligner(config: dict[str, Any], state: dict[str, Tensor], path: Path) -> None:
    """Write ``map_aligner.pt``: state dict and configuration, loadable with ``weights_only=True``."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("wb") as file:  # by its name alone torch would not say what is wrong with the disk
        torch.save({"config": config, "state_dict": state}, file)
    put_in_place(unfinished, path)


def load_aligner(path: str | Path) -> KVAligner | AlignerGroup:
    """The aligner of a ``map_aligner.pt``, on the CPU.

    Raises:
        InputError: no such file, or not one that kvds wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a map_aligner.pt of a finished run with an alignment")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        aligner = aligner_from_config_dict(content["config"])
        aligner.load_state_dict(content["state_dict"])
    except Exception as error:  # a damaged file can fail anywhere in torch's reader
        raise InputError(f"{path}: not an aligner that kvds saved ({' '.join(str(error).split())[:160]})") from error
    return aligner
