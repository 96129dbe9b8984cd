"""Kill a run again and again, let it resume, and compare its end with that of a run that was never disturbed.

    python benchmarks/chaos.py --kills 40 --ranks 2 --output /tmp/chaos      (about ten minutes on two cores)

Kills are ``kill -9`` at random moments: of one rank or of all in turn, and every other time while the run writes a
checkpoint. Prints one line per attempt and a summary; exits 1 where a bit of student, map or records differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.forked_ranks import RankServer
from tests.survival_runs import flags, make_models, records

# Runs in each rank: once the first step has begun (or the first checkpoint is being written), the victim has a random
# while to live.
_DEATH = """
import os, signal, threading, time
from kvds.checkpoint_manifest import ChecksummedFile
from kvds.data.batches import BatchLoader

def die():
    time.sleep({seconds})
    os.kill(os.getpid(), signal.SIGKILL)

begun = []

def begin():
    if not begun and rank in {victims}:
        begun.append(True)
        threading.Thread(target=die, daemon=True).start()

def step(loader, step, ask=BatchLoader.step):
    if {saving} is False and step > 0:
        begin()
    return ask(loader, step)

def write(file, data, ask=ChecksummedFile.write):
    if {saving}:
        begin()
    return ask(file, data)

BatchLoader.step, ChecksummedFile.write = step, write
"""


def same_bits(one: Path, other: Path) -> int:
    """Bytes of student and map compared.

    Raises:
        SystemExit: a bit differs.
    """
    import torch
    from safetensors.torch import load_file

    count = 0
    for name in ("student/model.safetensors", "map_aligner.pt"):
        paths = [run / name for run in (one, other)]
        loaded = [
            load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)["state_dict"]
            for path in paths
        ]
        if loaded[0].keys() != loaded[1].keys():
            sys.exit(f"chaos: {name} of the two runs hold different names")
        for key, value in loaded[0].items():
            if not torch.equal(value, loaded[1][key]):
                sys.exit(f"chaos: {name}: {key} differs")
            count += value.numel() * value.element_size()
    if records(one) != records(other):
        sys.exit("chaos: metrics.jsonl differs")
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="how often the run is killed")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    parser.add_argument("--output", type=Path, required=True, help="folder for models and runs, made anew")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)
    make_models(arguments.output)
    steps = 6 + 3 * arguments.kills  # a kill lets some two steps pass
    settings = {
        "max_steps": steps, "save_steps": 2, "keep_checkpoints": 2, "logging_steps": 3, "batch_size": 1,
        "warmup_ratio": 0.1, "lr": 0.003,
    }  # fmt: skip
    chance, begun = random.Random(arguments.seed), time.monotonic()
    kills = {"one rank": 0, "all ranks": 0, "while saving": 0}
    survivors_left, attempts = 0, 0
    with RankServer() as server:

        def run(name: str, setup: str = "") -> list[int | None]:
            command = flags(arguments.output, arguments.output / name, **settings)
            ranks = server.start(command, ranks=arguments.ranks, log=arguments.output / f"{name}.log", setup=setup)
            return ranks.wait(600)

        if any(run("straight")):
            sys.exit(f"chaos: the undisturbed run failed, see {arguments.output}/straight.log")
        # Moments in units of a step, so that a slow machine gets as far between two kills as a fast one.
        step_seconds = (time.monotonic() - begun) / steps
        finished = False
        while sum((kills["one rank"], kills["all ranks"])) < arguments.kills and not finished:
            attempts += 1
            everyone, saving = attempts % 2 == 0, attempts % 4 < 2
            victims = list(range(arguments.ranks)) if everyone else [chance.randrange(arguments.ranks)]
            seconds = step_seconds * chance.uniform(0, 0.5 if saving else 6.0)
            codes = run("killed", _DEATH.format(seconds=seconds, victims=victims, saving=saving))
            survivors_left += codes.count(None)
            finished = not any(codes)
            killed = any(codes[victim] == -9 for victim in victims)
            kills["all ranks" if everyone else "one rank"] += killed
            kills["while saving"] += killed and saving
            latest = arguments.output / "killed/checkpoints/latest"
            told = latest.read_text() if latest.exists() else "no checkpoint yet"
            moment = "saving" if saving else "stepping"
            print(
                f"attempt {attempts:3d}: {moment:8s} {seconds:5.2f} s, ranks {victims}: codes {codes}, {told}",
                flush=True,
            )
        if not finished and any(run("killed")):
            sys.exit(f"chaos: the killed run did not end, see {arguments.output}/killed.log")
    compared = same_bits(arguments.output / "straight", arguments.output / "killed")
    summary = {
        "ranks": arguments.ranks, "optimizer_steps": steps, "kills": kills["one rank"] + kills["all ranks"],
        **{f"kills_{name.replace(' ', '_')}": count for name, count in kills.items()},
        "ranks_left_behind": survivors_left,
        "bytes_compared": compared, "records_compared": len(records(arguments.output / "straight")),
        "seconds": round(time.monotonic() - begun),
    }  # fmt: skip
    print(json.dumps(summary))
    return 1 if survivors_left else 0


if __name__ == "__main__":
    sys.exit(main())
