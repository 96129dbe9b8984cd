"""Two runs that must have ended equal: ``python tests/cluster/compare.py RUN OTHER [STEPS]``; exit status 1 if not.

Compared are the losses of every step (each step once) and the exported weights, with room for sums in another order.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

TOLERANCE = 1e-5


def losses(run: Path) -> dict[int, dict[str, float]]:
    """Step → its losses; a step that stands there twice is an error."""
    found: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        kept = {key: value for key, value in record.items() if key.startswith("loss/")}
        if kept:
            if record["step"] in found:
                raise SystemExit(f"compare: {run} has step {record['step']} twice")
            found[record["step"]] = kept
    return found


def main() -> None:
    """Compare and say the largest differences."""
    run, other = Path(sys.argv[1]), Path(sys.argv[2])
    first, second = losses(run), losses(other)
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else len(first)
    if sorted(first) != sorted(second) or len(first) != steps:
        raise SystemExit(f"compare: {run} has {len(first)} steps, {other} {len(second)}; expected {steps} each")
    loss = max(abs(first[step][key] - second[step][key]) for step in first for key in first[step])
    weights = [load_file(folder / "student/model.safetensors") for folder in (run, other)]
    if weights[0].keys() != weights[1].keys():
        raise SystemExit(f"compare: {run} and {other} have other weights")
    weight = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    moved = max(first[1]["loss/total"] - first[steps]["loss/total"], 0.0)
    print(f"compare: {run.name} and {other.name}: losses within {loss:.1e}, weights within {weight:.1e}, "
          f"loss fell by {moved:.3f}")  # fmt: skip
    if not (loss < TOLERANCE and weight < 10 * TOLERANCE and moved > 0.1):
        raise SystemExit(1)
    assert torch.isfinite(torch.cat([value.float().flatten() for value in weights[0].values()])).all()


if __name__ == "__main__":
    main()
