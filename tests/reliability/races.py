"""Two jobs race for one output folder, again and again, some of them killed: what is left is one job's, to the bit.

    python -m tests.reliability.races --turns 50 --output /tmp/races      (about ten minutes on two cores)

The jobs differ in their seed alone, and start within a second of each other. In every second turn whoever has the
folder is killed at a random moment, and both start again. Whoever comes second is refused in one line, and the folder
holds what an undisturbed run of one of the two seeds leaves. Prints a line per turn; exits 1 where that is not so.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from tests.harness.forked_ranks import Ranks, RankServer
from tests.harness.survival_runs import flags, make_models
from tests.reliability.chaos import same_bits

SEEDS = (0, 1)
_SETTINGS = {"max_steps": 6, "save_steps": 1, "keep_checkpoints": 2}
_KILL = """
import os, signal, threading, time
from kvds.training import run

def begin(cfg, *arguments, ask=run.TrainingRun.fit, **keywords):
    threading.Thread(target=lambda: (time.sleep({seconds}), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
    return ask(cfg, *arguments, **keywords)

run.TrainingRun.fit = begin
"""


def race(server: RankServer, models: Path, folder: Path, *, turns: int, seed: int = 0) -> Counter[str]:
    """So many races, each for a folder of its own; how they ended, as text → how often.

    Raises:
        SystemExit: both had the folder, none had it, or what is there is no undisturbed run's.
    """
    chance, ends = random.Random(seed), Counter[str]()

    def begin(output: Path, number: int, log: Path, setup: str = "") -> Ranks:
        return server.start(flags(models, output, seed=number, **_SETTINGS), log=log, setup=setup)

    straight = [folder / f"straight-{number}" for number in SEEDS]
    for number, output in zip(SEEDS, straight, strict=True):
        if begin(output, number, output.with_suffix(".log")).wait(600) != [0]:
            sys.exit(f"races: the undisturbed run failed, see {output}.log")
    for turn in range(turns):
        output, killing, history = folder / f"turn-{turn}", turn % 2 == 1, []
        start, codes = 0, dict[int, int | None]()
        # Both may be refused: one that took the folder for a moment, to find the other seed in it, and one that came
        # in that moment. Nothing is mixed, and they start again.
        while 0 not in codes.values() and start < 6:
            setup = _KILL.format(seconds=chance.uniform(0, 0.5)) if killing and not start else ""
            order = chance.sample(SEEDS, 2)
            logs = {number: folder / f"turn-{turn}-start-{start}-seed-{number}.log" for number in order}
            first = begin(output, order[0], logs[order[0]], setup)
            time.sleep(chance.choice((0, 0, 0.1, 1.0)))
            jobs = {order[0]: first, order[1]: begin(output, order[1], logs[order[1]], setup)}
            codes = {number: job.wait(600)[0] for number, job in jobs.items()}
            for number, code in codes.items():
                text = logs[number].read_text(errors="replace")
                lines = [line for line in text.splitlines() if line.startswith("kvds: error: ")]
                if "Traceback" in text or code not in (0, 2, -9) or (code == 2) != (len(lines) == 1):
                    sys.exit(f"races: turn {turn}: seed {number} ended with {code}, see {logs[number]}")
                if code == 2:
                    whose = "another job's folder" if "belongs to process" in lines[0] else "another seed's checkpoint"
                    history.append(f"refused ({whose})")
            start += 1
            # Who comes when the other is dead and has saved nothing takes the folder, and may be killed as well.
            history += ["killed"] * [*codes.values()].count(-9)
        won = [number for number, code in codes.items() if code == 0]
        if len(won) != 1:
            sys.exit(f"races: turn {turn}: ended with {codes}, see {output}*.log")
        same_bits(straight[SEEDS.index(won[0])], output)
        ends[", ".join([*history, "one finished"])] += 1
        print(f"turn {turn}: {', '.join(history)}; seed {won[0]} finished, equal to the bit", flush=True)
    return ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=50, help="how many races")
    parser.add_argument("--seed", type=int, default=0, help="of moments")
    parser.add_argument("--output", type=Path, required=True, help="folder for models and runs, made anew")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    arguments.output.mkdir(parents=True)
    make_models(arguments.output)
    started = time.monotonic()
    with RankServer() as server:
        ends = race(server, arguments.output, arguments.output, turns=arguments.turns, seed=arguments.seed)
    print(json.dumps({"turns": arguments.turns, "seconds": round(time.monotonic() - started), **ends}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
