"""Kill a run again and again, let it resume, and compare its end with that of a run that was never disturbed.

    python -m tests.reliability.chaos --kills 40 --ranks 2 --output /tmp/chaos      (about eight minutes on two cores)

Kills are ``kill -9`` at random moments: of one rank or of all in turn, and every other time while the run writes a
checkpoint. Prints one line per attempt and a summary; exits 1 where a bit of student, map or records differs, where a
rank is left behind, or where the run ended before it was killed so often. Tests run a short form of it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

from tests.harness.forked_ranks import RankServer
from tests.harness.survival_runs import flags, make_models, records

# Runs in each rank: once a step has begun (or the first checkpoint is being written), the victim has a part of a step
# to live, as long as one lasts on this machine now.
_DEATH = """
import os, signal, threading, time
from kvds.checkpoint.manifest import ChecksummedFile
from kvds.data.loader import BatchLoader

begun, steps = [], [time.monotonic()]

def die():
    time.sleep({share} * (steps[-1] - steps[-2]))
    os.kill(os.getpid(), signal.SIGKILL)

def begin():
    if not begun and rank in {victims}:
        begun.append(True)
        threading.Thread(target=die, daemon=True).start()

def step(loader, step, ask=BatchLoader.step):
    steps.append(time.monotonic())
    if {saving} is False and len(steps) > {steps}:
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


def chaos(server: RankServer, models: Path, folder: Path, *, kills: int, ranks: int, seed: int = 0) -> dict[str, int]:
    """Kill a run so often, let it end, and compare; figures of what was done.

    Args:
        server: Forks the ranks.
        models: From :func:`tests.harness.survival_runs.make_models`.
        folder: Gets two runs and their logs.
        kills: How often.
        ranks: Processes.
        seed: Of moments and victims.

    Raises:
        SystemExit: a run failed, or its end differs.
    """
    steps = 6 + 3 * kills  # a kill lets some two steps pass
    settings = {
        "max_steps": steps, "save_steps": 2, "keep_checkpoints": 2, "logging_steps": 3, "batch_size": 1,
        "warmup_ratio": 0.1, "lr": 0.003,
    }  # fmt: skip
    chance, begun = random.Random(seed), time.monotonic()
    straight, killed = folder / "straight", folder / "killed"

    def run(output: Path, setup: str = "") -> list[int | None]:
        log = output.with_suffix(".log")
        return server.start(flags(models, output, **settings), ranks=ranks, log=log, setup=setup).wait(600)

    if any(run(straight)):
        sys.exit(f"chaos: the undisturbed run failed, see {straight}.log")
    done = {"kills": 0, "kills_one_rank": 0, "kills_all_ranks": 0, "kills_while_saving": 0, "ranks_left_behind": 0}
    attempts, finished = 0, False
    while done["kills"] < kills and not finished:
        attempts += 1
        everyone, saving = attempts % 2 == 0, attempts % 4 < 2
        victims = list(range(ranks)) if everyone else [chance.randrange(ranks)]
        begin, share = chance.randrange(2, 6), chance.uniform(0, 0.5 if saving else 1.0)
        codes = run(killed, _DEATH.format(steps=begin, share=share, victims=victims, saving=saving))
        done["ranks_left_behind"] += codes.count(None)
        finished = not any(codes)
        hit = any(codes[victim] == -9 for victim in victims)
        for name in ("kills", "kills_all_ranks" if everyone else "kills_one_rank"):
            done[name] += hit
        done["kills_while_saving"] += hit and saving
        latest = killed / "checkpoints/latest"
        told = latest.read_text() if latest.exists() else "no checkpoint yet"
        moment = "in a save" if saving else f"in step {begin}"
        print(f"attempt {attempts}: {moment} after {share:.2f} of a step, ranks {victims}: {codes}, {told}", flush=True)
    if not finished and any(run(killed)):
        sys.exit(f"chaos: the killed run did not end, see {killed}.log")
    return {
        "ranks": ranks, "optimizer_steps": steps, **done, "bytes_compared": same_bits(straight, killed),
        "records_compared": len(records(straight)), "seconds": round(time.monotonic() - begun),
    }  # fmt: skip


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
    output, kills = arguments.output, arguments.kills
    with RankServer() as server:
        summary = chaos(server, output, output, kills=kills, ranks=arguments.ranks, seed=arguments.seed)
    print(json.dumps(summary))
    return 1 if summary["ranks_left_behind"] or summary["kills"] < kills else 0


if __name__ == "__main__":
    sys.exit(main())
