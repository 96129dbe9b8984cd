"""Evidence of handoff on the built-in problems: every student of an experiment, fitted, judged, tabled.

    bash benchmarks/handoff_problems.sh --to outputs/handoff                       # students, then this
    python -m benchmarks.handoff.evidence outputs/handoff/handoff_problems         # a minute a student and core

Students that are judged already are not judged again. benchmarks/results/HANDOFF.md says what is asked.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.handoff.students import add_judging_flags, common_seeds, judge_experiment, model_device, number
from benchmarks.records import RESULTS, markdown_table
from kvds.data.encoding import encode_examples, prompt_ids
from kvds.data.example import Example
from kvds.data.synthetic import GAINS, LOSSES, synthetic_examples
from kvds.evaluation.handoff import CONDITIONS, WRONG, evaluate_handoff
from kvds.handoff import HandoffModel, fit_pair

TEACHER = Path(__file__).resolve().parents[2] / "launch/quickstart_teacher"
PROMPTS = (8, 32, 128, 512)
LEARNED = 0.5
"""Own exact match under which a student says nothing about handoff."""
PREDICTORS = ("r2_keys", "r2_values", "minus_attention_error")


def changes(example: Example) -> int:
    """How often a problem's total changes."""
    return sum(word in (*GAINS, *LOSSES) for word in example.prompt.split())


def judge_student(folder: Path, *, held_out: int) -> list[dict[str, Any]]:
    """A row per fit."""
    device, tokenizer = model_device(), AutoTokenizer.from_pretrained(TEACHER)
    teacher, student = (AutoModelForCausalLM.from_pretrained(path).to(device).eval() for path in (TEACHER, folder))
    training = synthetic_examples("train", problems=1000, seed=0)
    judged = synthetic_examples("eval", problems=1, seed=0)[:held_out]
    longer = [example for example in judged if changes(example) == 3]
    two = [example for example in training if changes(example) == 2]
    fits: list[tuple[str, list[Example], list[Example], Sequence[str]]] = [
        (f"{count} prompts", training[:count], judged, CONDITIONS if count == PROMPTS[-1] else ("mapped",))
        for count in PROMPTS
    ]
    fits += [
        ("other text", two[:128], longer, ("mapped",)),
        ("other text, fitted to both", training[:128], longer, ("mapped",)),
    ]
    rows = []
    for name, fitted, asked, conditions in fits:
        cache_map, fit = fit_pair(teacher, student, prompt_ids(fitted, tokenizer), batch_size=64)
        samples = list(encode_examples(asked, tokenizer, 64).samples)
        results = evaluate_handoff(
            HandoffModel(teacher, student, cache_map), tokenizer, asked, samples, batch_size=64, max_new_tokens=40,
            conditions=conditions, progress=False,
        )  # fmt: skip
        row: dict[str, Any] = {"fit": name, "rows": len(samples)}
        row |= {f"r2_{part}": value for part, value in fit.mean_r2.items()}
        row["minus_attention_error"] = -results["mapped"]["all"]["attention_error"]
        for condition in conditions:
            row[f"{condition}_exact_match"] = results[condition]["all"]["exact_match"]
            row[f"{condition}_cross_entropy"] = results[condition]["all"]["cross_entropy"]
        rows.append(row)
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Tables: per arm; how few prompts; other text; what predicts. Of seeds that every arm has, if there are any."""
    arms, seeds = len({row["arm"] for row in rows}), common_seeds(rows)
    rows = [row for row in rows if int(row["seed"]) in seeds] or rows
    told = f"{arms} arms, seeds {' '.join(map(str, seeds))}" if seeds else f"{arms} arms, no seed in all of them"
    whole = [row for row in rows if row["fit"] == f"{PROMPTS[-1]} prompts"]
    learned = {(row["arm"], row["seed"]) for row in whole if number(row["own_exact_match"]) >= LEARNED}
    lines = [f"{told}.", ""]
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in whole if row["arm"] == arm]
        some = [row for row in mine if (row["arm"], row["seed"]) in learned]
        shown = some or mine
        entry: dict[str, Any] = {"arm": arm, "students": len(mine), "learned": len(some)}
        for condition in CONDITIONS:
            values = [100 * number(row[f"{condition}_exact_match"]) for row in shown]
            entry[condition] = f"{sum(values) / len(values):.1f}"
        entry["mapped, every seed"] = " ".join(f"{100 * number(row['mapped_exact_match']):.0f}" for row in shown)
        for name in ("r2_keys", "r2_values"):
            entry[name] = f"{sum(number(row[name]) for row in shown) / len(shown):.3f}"
        entry["attention error"] = f"{-sum(number(row['minus_attention_error']) for row in shown) / len(shown):.4f}"
        idle = sum(
            any(number(r[f"{wrong}_exact_match"]) > 0.5 * number(r["mapped_exact_match"]) for wrong in WRONG)
            for r in shown
        )
        entry["no evidence"] = idle
        table.append(entry)
    lines += ["Exact match in % by the cache that the student reads (512 prompts fitted):", ""]
    lines += [markdown_table(table, list(table[0])), ""]
    fits = list(dict.fromkeys(row["fit"] for row in rows))
    few = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        entry = {"arm": arm}
        for fit in fits:
            values = [
                100 * number(row["mapped_exact_match"])
                for row in rows
                if row["arm"] == arm and row["fit"] == fit and (row["arm"], row["seed"]) in learned
            ]
            entry[fit] = f"{sum(values) / len(values):.1f}" if values else "–"
        few.append(entry)
    lines += ["From the mapped cache, of students that have learned, by what the map was fitted to:", ""]
    lines += [markdown_table(few, ["arm", *fits]), ""]
    chosen = [row for row in rows if (row["arm"], row["seed"]) in learned and row["fit"].endswith("prompts")]
    lines += [f"Spearman's ρ with mapped exact match over {len(chosen)} fits of students that have learned:", ""]
    match = [number(row["mapped_exact_match"]) for row in chosen]
    rho = []
    for name in PREDICTORS:
        found = (
            spearmanr([number(row[name]) for row in chosen], match).statistic if len(set(match)) > 1 else float("nan")
        )
        rho.append({"predictor": name, "ρ": f"{found:.3f}"})
    lines += [markdown_table(rho, ["predictor", "ρ"]), ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Judge what is new, write CSV and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_judging_flags(parser)
    parser.add_argument("--held_out", type=int, default=200, help="problems judged (200)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "handoff_problems.csv", help="CSV; tables go beside it"
    )
    arguments = parser.parse_args(argv)
    return judge_experiment(arguments, partial(judge_student, held_out=arguments.held_out), report)


if __name__ == "__main__":
    main()
