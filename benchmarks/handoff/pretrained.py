"""Evidence of handoff for a pretrained pair: every student of an experiment, its maps fitted, judged, tabled.

    bash benchmarks/handoff_pretrained.sh --data DATA --to outputs/handoff         # rows, teacher, students, then this
    python -m benchmarks.handoff.pretrained outputs/handoff/handoff_pretrained --teacher TEACHER --data_dir DATA

Maps are fitted to prompts of the first corpus alone, but for one that is fitted to all; the others are other text.
Students that are judged already are not judged again. benchmarks/results/HANDOFF.md says what is asked.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.handoff.students import Row, add_judging_flags, common_seeds, judge_experiment, model_device, number
from benchmarks.records import markdown_table
from kvds.data.encoding import EncodedSample, encode_examples
from kvds.data.example import Example
from kvds.data.mixture import first_per_corpus, load_mixture
from kvds.evaluation.handoff import CONDITIONS, WRONG, evaluate_handoff
from kvds.handoff import CacheMap, HandoffModel, fit_pair
from kvds.handoff.continuation import first_prompt_length
from kvds.handoff.training import MapTraining

LAYERS, TRAINED = 4, 32  # source layers per layer; rows per step that trains a map
FITS = ("4 layers", "4 layers, trained", "all layers", "4 layers, all corpora")
"""The first is the one that decides."""


def judge_student(
    folder: Path, *, teacher: str, corpora: Sequence[str], data_dir: str, prompts: int, held_out: int, steps: int,
    max_length: int, max_new_tokens: int, batch_size: int,
) -> list[Row]:  # fmt: skip
    """A row per fit."""
    device, tokenizer = model_device(), AutoTokenizer.from_pretrained(folder)
    reader, student = (AutoModelForCausalLM.from_pretrained(path).to(device).eval() for path in (teacher, folder))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    judged = first_per_corpus(load_mixture(corpora, "eval", data_dir=data_dir).examples, held_out)
    rows = list(encode_examples(judged, tokenizer, max_length).samples)

    def training(names: Sequence[str]) -> list[EncodedSample]:
        held = load_mixture(names, "eval", data_dir=data_dir).examples
        mixture = load_mixture(names, "train", data_dir=data_dir, subset_size=prompts, held_out=held)
        return list(encode_examples(mixture.examples[:prompts], tokenizer, max_length).samples)

    first, every = training(corpora[:1]), training(corpora)
    found = []
    for name in FITS:
        samples = every if name.endswith("all corpora") else first
        texts = [sample.input_ids[: first_prompt_length(sample)] for sample in samples]
        layers = None if name.startswith("all") else min(LAYERS, reader.config.num_hidden_layers)
        cache_map, fit = fit_pair(reader, student, texts, layers=layers, batch_size=batch_size, pad=pad)
        if name.endswith("trained"):
            _train(
                MapTraining(reader, student, cache_map, samples, batch_size=min(TRAINED, batch_size), pad=pad), steps
            )
        conditions = CONDITIONS if name == FITS[0] else ("mapped",)
        row: Row = {"fit": name, "rows": len(rows)} | {f"r2_{part}": r2 for part, r2 in fit.mean_r2.items()}
        row |= _judge(reader, student, cache_map, tokenizer, judged, rows, conditions, batch_size, max_new_tokens)
        found.append(row)
    return found


def _train(training: MapTraining, steps: int) -> None:
    with torch.enable_grad():
        training.attention(steps, 1e-4)
        training.answers(steps, 1e-4)


def _judge(
    reader: Any, student: Any, cache_map: CacheMap, tokenizer: Any, examples: Sequence[Example],
    rows: Sequence[EncodedSample], conditions: Sequence[str], batch_size: int, max_new_tokens: int,
) -> Row:  # fmt: skip
    results = evaluate_handoff(
        HandoffModel(reader, student, cache_map), tokenizer, examples, rows, batch_size=batch_size,
        max_new_tokens=max_new_tokens, conditions=conditions, progress=False,
    )  # fmt: skip
    found: Row = {"minus_attention_error": -results["mapped"]["all"]["attention_error"]}
    for condition, of in results.items():
        for corpus, values in of.items():
            for what in ("exact_match", "cross_entropy"):
                found[f"{condition} {corpus} {what}"] = values[what]
    return found


def corpora_in(rows: Sequence[Row]) -> list[str]:
    """As they are called in results, the corpora of the rows."""
    return [key.split()[1] for key in rows[0] if key.startswith("mapped ") and key.endswith(" exact_match")]


def report(rows: Sequence[Row]) -> str:
    """Per corpus a table of arms by cache, then of arms by fit; of seeds that every arm has, if there are any."""
    seeds = common_seeds(rows)
    rows = [row for row in rows if int(row["seed"]) in seeds] or rows
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    told = f"seeds {' '.join(map(str, seeds))}" if seeds else "no seed in all of them"
    lines = [f"{len(arms)} arms, {told}.", ""]

    def mean(arm: str, fit: str, key: str) -> float:
        values = [number(row[key]) for row in rows if row["arm"] == arm and row["fit"] == fit]
        return sum(values) / len(values) if values else float("nan")

    for corpus in corpora_in(rows):
        table = []
        for arm in arms:
            entry: Row = {"arm": arm}
            for condition in CONDITIONS:
                entry[condition] = f"{100 * mean(arm, FITS[0], f'{condition} {corpus} exact_match'):.1f}"
            mapped = mean(arm, FITS[0], f"mapped {corpus} exact_match")
            wrong = max(mean(arm, FITS[0], f"{name} {corpus} exact_match") for name in WRONG)
            entry["evidence"] = "yes" if wrong < 0.5 * mapped else "no"
            for fit in FITS[1:]:
                entry[f"mapped, {fit}"] = f"{100 * mean(arm, fit, f'mapped {corpus} exact_match'):.1f}"
            for condition in ("own", "mapped"):
                entry[f"{condition}, nats"] = f"{mean(arm, FITS[0], f'{condition} {corpus} cross_entropy'):.3f}"
            table.append(entry)
        lines += [f"{corpus}, exact match in % by the cache that the student reads ({FITS[0]}):", ""]
        lines += [markdown_table(table, list(table[0])), ""]
    fits = [
        {"arm": arm, "fit": fit} | {key: f"{mean(arm, fit, key):.3f}" for key in ("r2_keys", "r2_values")}
        | {"attention error": f"{-mean(arm, fit, 'minus_attention_error'):.4f}"}
        for arm in arms for fit in FITS
    ]  # fmt: skip
    return "\n".join([*lines, "How well maps fit:", "", markdown_table(fits, list(fits[0])), ""])


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Judge what is new, write CSV and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_judging_flags(parser)
    parser.add_argument("--teacher", required=True, help="folder of the teacher")
    parser.add_argument("--data_dir", required=True, help="folder of the rows")
    parser.add_argument("--corpora", nargs="+", default=["context.jsonl", "svamp", "arc_easy"], help="fitted, others")
    numbers = {"prompts": 1024, "held_out": 100, "steps": 200, "max_length": 384, "max_new_tokens": 48}
    numbers["batch_size"] = 100
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    parser.add_argument("--output", type=Path, required=True, help="CSV; tables go beside it")
    arguments = parser.parse_args(argv)
    how = {name: getattr(arguments, name) for name in ("teacher", "data_dir", "corpora", *numbers)}
    return judge_experiment(arguments, partial(judge_student, **how), report)


if __name__ == "__main__":
    main()
