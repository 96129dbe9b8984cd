"""Check what a run left: ``python launch/check_run.py RUN_DIR MODE LOG`` (used by smoke.sh); exits 1 naming what is
wrong.
"""

import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvds.checkpoint.aligner_file import load_aligner


def main(run: Path, mode: str, log: Path) -> int:
    """Finite losses, the mode in the log, a student and an aligner that load and compute."""
    faults = []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss/task" in line]
    for key in ("loss/task", "loss/kv"):
        values = [line.get(key) for line in trained]
        if not values or not all(value is not None and math.isfinite(value) for value in values):
            faults.append(f"{key} is not finite at each logged step: {values}")
    if f"mode {mode}" not in log.read_text():
        faults.append(f"the log does not say 'mode {mode}'")
    model = AutoModelForCausalLM.from_pretrained(run / "student")
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    logits = model(**tokenizer("2 + 3 =", return_tensors="pt")).logits
    if not torch.isfinite(logits).all():
        faults.append("the saved student's logits are not finite")
    if not sum(p.numel() for p in load_aligner(run / "map_aligner.pt").parameters()):
        faults.append("map_aligner.pt holds no parameters")
    for fault in faults:
        print(f"check_run: {run}: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
