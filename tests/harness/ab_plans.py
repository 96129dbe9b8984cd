"""A plan of runs that are over in a second or two."""

import json
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PLAN = f"""
base: {REPOSITORY}/launch/recipes/quickstart.yaml
settings: {{batch_size: 2, max_steps: STEPS, eval_steps: 2, logging_steps: 1, eval_subset_size: 4, max_new_tokens: 2,
           synthetic_problems: 16, calibration_batches: 1, deepspeed_config: ds_configs/CONFIG.json}}
primary: final/cross_entropy
better: lower
seeds: [3]
baseline: task
arms: {{ARMS}}
"""
ARMS = "task: {alignment_mode: none}, flat: {alignment_mode: flat, kv_weight: 1.0}"


def write_plan(
    folder: Path, *, steps: int = 2, config: str = "zero0_fp32", arms: str = ARMS, common: dict[str, Any] | None = None
) -> Path:
    """``folder/tiny.yaml``; ``config`` is the name of a file of ds_configs, ``common`` further settings of all arms."""
    path = folder / "tiny.yaml"
    more = "".join(f", {name}: {json.dumps(value)}" for name, value in (common or {}).items())
    text = PLAN.replace("STEPS", str(steps)).replace("CONFIG", config).replace("ARMS", arms).replace(" COMMON", more)
    path.write_text(text)
    return path
