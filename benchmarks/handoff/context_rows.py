"""Rows whose answer stands in the prompt: a problem, its worked solution, and what number that comes to.

    python -m benchmarks.handoff.context_rows --output FOLDER --data_dir DATA      # of GSM8K's training and test rows
    python -m benchmarks.handoff.context_rows --output FOLDER --datasets synthetic # of the built-in problems

Writes ``context.jsonl`` and ``context.eval.jsonl``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from kvds.data.example import Example
from kvds.data.mixture import load_mixture

QUESTION = "What number does this come to?"


def context_row(example: Example, question: str) -> dict[str, str]:
    """The row of an example with a rationale."""
    return {"prompt": f"{example.prompt}\n{example.rationale}\n{question}", "rationale": "", "answer": example.answer}


def main(argv: Sequence[str] | None = None) -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder, made if missing")
    parser.add_argument("--datasets", nargs="+", default=["gsm8k"], help="corpora with rationales (gsm8k)")
    parser.add_argument("--data_dir", help="folder with the publishers' files")
    parser.add_argument("--synthetic_problems", type=int, default=1000, help="size of the built-in corpus (1000)")
    parser.add_argument("--question", default=QUESTION, help="asked at the end (%(default)s)")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    how = {"data_dir": arguments.data_dir, "synthetic_problems": arguments.synthetic_problems}
    for split, name in (("train", "context.jsonl"), ("eval", "context.eval.jsonl")):
        examples = load_mixture(arguments.datasets, split, **how).examples
        lines = [
            json.dumps(context_row(example, arguments.question), ensure_ascii=False) + "\n" for example in examples
        ]
        (arguments.output / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
