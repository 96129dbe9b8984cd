"""The data of a run on a few built-in problems, for tests of what is made of rows."""

from pathlib import Path
from typing import Any

from kvds.config.recipe import parse_run_config
from kvds.data.run_data import RunData, load_run_data


def load(tokenizer: Any, folder: Path, **changes: object) -> RunData:
    """Rows as a run with these settings has them, on one rank."""
    values = {
        "model_name": "gpt2", "datasets": "synthetic", "synthetic_problems": 21, "batch_size": 4, "max_length": 64,
        "eval_subset_size": 5, "output_dir": folder / "out", **changes,
    }  # fmt: skip
    argv = [token for key, value in values.items() for token in (f"--{key}", *str(value).split())]
    return load_run_data(parse_run_config(argv), tokenizer, rank=0, world_size=1)
