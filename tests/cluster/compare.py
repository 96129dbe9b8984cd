"""Two runs that must have ended equal: ``python tests/cluster/compare.py RUN OTHER [--close]``; exit status 1 if not.

Compared are the losses of every step (each step once) and the exported weights, to the bit; with ``--close`` as far as
sums in another order allow.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-3, 1e-2


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
    close = "--close" in sys.argv[3:]
    first, second = losses(run), losses(other)
    if sorted(first) != sorted(second):
        raise SystemExit(f"compare: {run} has steps {sorted(first)}, {other} {sorted(second)}")
    loss = max(abs(first[step][key] - second[step][key]) for step in first for key in first[step])
    weights = [load_file(folder / "student/model.safetensors") for folder in (run, other)]
    if weights[0].keys() != weights[1].keys():
        raise SystemExit(f"compare: {run} and {other} have other weights")
    weight = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    fell = first[min(first)]["loss/total"] - first[max(first)]["loss/total"]
    print(f"compare: {run.name} and {other.name}: losses within {loss:.1e}, weights within {weight:.1e}, "
          f"loss fell by {fell:.3f} in {len(first)} steps")  # fmt: skip
    # Written so that a difference which is no number fails, too.
    if not (loss <= close * LOSS_TOLERANCE and weight <= close * WEIGHT_TOLERANCE and fell > 0.1):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
