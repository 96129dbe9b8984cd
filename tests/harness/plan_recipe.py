"""A recipe's configuration, with changes, and the sizes of Qwen2's pair."""

from pathlib import Path

from kvds.config import RunConfig
from kvds.config.recipe import parse_run_config

QWEN = {
    "teacher": {"num_hidden_layers": 28, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12},
    "student": {"num_hidden_layers": 24, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14},
}


def config(recipe: Path, **changes: object) -> RunConfig:
    flags = [token for key, value in changes.items() for token in (f"--{key}", str(value))]
    return parse_run_config(["--config", str(recipe), "--output_dir", "outputs/x", *flags])


# -- counting live memory ----------------------------------------------------------------------------------------------
