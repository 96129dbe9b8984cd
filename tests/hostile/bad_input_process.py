"""Runs every case of CASES.json through the real entry points, in one process.

    python -m tests.hostile.bad_input_process CASES.json

Says for each how it ended, what it wrote, how many models were asked for their weights, and how long it took.
"""

import contextlib
import importlib.util
import io
import json
import sys
import time
import traceback
from pathlib import Path

import kvds.teacher.build
import kvds.training.build
from kvds import cli

REPOSITORY = Path(__file__).resolve().parents[2]


def programs(loaded: list[str]) -> dict[str, object]:
    """The main functions of ``launch/distill.py`` and ``kvds``; names of models that are loaded go to ``loaded``."""
    spec = importlib.util.spec_from_file_location("distill", REPOSITORY / "launch/distill.py")
    assert spec is not None and spec.loader is not None
    distill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(distill)
    load_model = kvds.training.build.load_model
    for module in (kvds.training.build, kvds.teacher.build):
        module.load_model = lambda name, *args, **kwargs: loaded.append(name) or load_model(name, *args, **kwargs)
    return {"distill": distill.main, "kvds": cli.main}


def run(main, argv: list[str], loaded: list[str]) -> dict[str, object]:
    """One case."""
    loaded.clear()
    sys.argv = ["program", *argv]
    begun = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()) as stdout:
        try:
            code = main()
        except BaseException:  # what a user would see as a traceback
            code = 1
            traceback.print_exc()
    seconds = time.process_time() - begun
    texts = {"stderr": stderr.getvalue(), "stdout": stdout.getvalue()}
    return {"code": code, **texts, "loaded": len(loaded), "seconds": seconds}


if __name__ == "__main__":
    loaded: list[str] = []
    mains = programs(loaded)
    results = {}
    for case, (program, argv) in json.loads(Path(sys.argv[1]).read_text()).items():
        results[case] = run(mains[program], argv, loaded)
    print("RESULTS" + json.dumps(results))
