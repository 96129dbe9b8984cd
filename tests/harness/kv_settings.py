"""Settings for tests whose subject is keys and values, whatever part the default leaves out."""

from __future__ import annotations

from typing import Any

from kvds.config.settings import AlignmentSettings


def both_parts(**changes: Any) -> AlignmentSettings:
    """Keys and values, where ``changes`` ask for nothing else."""
    return AlignmentSettings(**{"kv_parts": "kv", **changes})
