"""The benchmark of a handoff runs at a tiny size, and its bytes are those of the map."""

from __future__ import annotations

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import benchmarks.handoff.students as module
from benchmarks.handoff import context_rows, pretrained
from benchmarks.handoff.bench import COLUMNS, main
from benchmarks.handoff.evidence import changes, report
from benchmarks.handoff.students import common_seeds, judged_rows, students_in
from kvds.data.mixture import load_mixture
from kvds.data.synthetic import synthetic_examples
from kvds.evaluation.handoff import CONDITIONS


def test_every_length_is_measured_and_written(tmp_path: Path) -> None:
    file = tmp_path / "handoff.csv"
    flags = ["--tiny", "--tokens", "16", "8", "--source_layers", "1", "2", "--rounds", "1", "--output", str(file)]
    found = main(flags)
    with file.open() as stream:
        written = list(csv.DictReader(stream))
    assert [(row["tokens"], row["source_layers"]) for row in found] == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert set(COLUMNS) <= set(written[0])
    for row in found:
        assert all(row[name] > 0 for name in COLUMNS[1:10])
    rows = found[1::2]
    # Of one source layer for each of two target layers two of the teacher's three are read.
    assert found[0]["floor_ms"] / rows[0]["floor_ms"] == pytest.approx(
        (2 * 7 * (32 + 16) + 2 * (2 * 16 * 8 + 2 * 8)) / (2 * 7 * (48 + 16) + 2 * (2 * 32 * 8 + 2 * 8))
    )
    # 3 source layers of 2 × 8 and 2 target layers of 2 × 4 numbers per token, for keys and values.
    per_token = rows[1]["floor_ms"] - rows[0]["floor_ms"]
    weights = 2 * (2 * 32 * 8 + 2 * 8)
    assert rows[0]["floor_ms"] / per_token == pytest.approx((2 * 7 * (48 + 16) + weights) / (2 * 8 * (48 + 16)))
    assert rows[1]["work_ms"] / rows[0]["work_ms"] == pytest.approx(15 / 7)
    assert "map_ms" in file.with_suffix(".md").read_text()


def test_the_evidence_tells_apart_what_has_not_learned() -> None:
    def row(arm: str, seed: int, fit: str, own: float, mapped: float) -> dict[str, object]:
        found = {"arm": arm, "seed": seed, "fit": fit, "r2_keys": mapped, "r2_values": -mapped}
        found |= {"minus_attention_error": mapped, "mapped_exact_match": mapped}
        names = ("another", "shuffled", "zeros", "none")
        return found | {f"{name}_exact_match": 0.0 for name in names} | {"own_exact_match": own}

    rows = [row("flat", seed, f"{n} prompts", 1.0, 0.5 + 0.1 * seed) for seed in (0, 1) for n in (8, 512)]
    rows += [row("task_only", 0, "512 prompts", 0.1, 0.05)]
    rows += [row("task_only", 1, "512 prompts", 0.1, 0.05)]
    text = report(rows)
    assert text.startswith("2 arms, seeds 0 1.")
    assert "| flat | 2 | 2 | 100.0 | 55.0 |" in text and "| task_only | 2 | 0 | 10.0 | 5.0 |" in text
    assert "| r2_keys | 1.000 |" in text and "| r2_values | -1.000 |" in text
    alone = report([*rows, row("flat", 2, "512 prompts", 1.0, 0.0)])
    assert alone == text  # a seed that one arm has and another has not compares nothing
    assert {changes(example) for example in synthetic_examples("train", problems=20, seed=0)} == {2, 3}


def judged(folder: Path) -> list[dict[str, object]]:
    """A row that says which student it is of."""
    return [{"of": (folder / "config.json").read_text()}]


def test_students_are_judged_in_turn_and_the_next_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_pool", ThreadPoolExecutor)
    for arm, seed in (("flat", 0), ("flat", 10), ("a-b", 0), ("a-b", 2)):
        folder = tmp_path / f"runs/report-{arm}-seed{seed}/student"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(f"{arm} {seed}")
    students, output = students_in(tmp_path), tmp_path / "rows.csv"
    assert [(s.arm, s.seed) for s in students] == [("a-b", 0), ("flat", 0), ("a-b", 2), ("flat", 10)]
    assert judged_rows(students, judged, output, minutes=0) == [] and not output.exists()
    first = judged_rows(students[:1], judged, output)
    assert [(row["arm"], row["seed"], row["of"]) for row in first] == [("a-b", 0, "a-b 0")]
    rows = judged_rows(students, judged, output, workers=2)
    assert {row["of"]: (row["arm"], row["seed"]) for row in rows} == {
        "a-b 0": ("a-b", 0), "flat 0": ("flat", 0), "a-b 2": ("a-b", 2), "flat 10": ("flat", 10)
    }  # fmt: skip
    assert len(rows) == 4 and judged_rows(students, judged, output) == rows
    assert common_seeds(rows) == [0]


def test_rows_whose_answer_stands_in_the_prompt(tmp_path: Path) -> None:
    flags = ["--output", str(tmp_path), "--datasets", "synthetic", "--synthetic_problems", "30"]
    context_rows.main([*flags, "--question", "how many?"])
    rows = [json.loads(line) for line in (tmp_path / "context.jsonl").read_text().splitlines()]
    first = synthetic_examples("train", problems=30, seed=0)[0]
    assert len(rows) == 30 and rows[0]["prompt"] == f"{first.prompt}\n{first.rationale}\nhow many?"
    assert rows[0]["answer"] == first.answer and not rows[0]["rationale"]
    loaded = load_mixture(["context.jsonl"], "eval", data_dir=str(tmp_path)).examples
    assert len(loaded) == len(synthetic_examples("eval", problems=30, seed=0)) and loaded[0].corpus == "context"


def test_the_table_of_pretrained_students_is_by_corpus_and_fit() -> None:
    def row(arm: str, seed: int, fit: str, mapped: float, wrong: float) -> dict[str, object]:
        found: dict[str, object] = {"arm": arm, "seed": seed, "fit": fit, "r2_keys": 0.5, "r2_values": 0.25}
        found["minus_attention_error"] = -0.125
        for corpus, share in (("context", 1.0), ("svamp", 0.5)):
            for condition in CONDITIONS:
                right = {"own": 0.8, "mapped": mapped}.get(condition, wrong)
                found[f"{condition} {corpus} exact_match"] = share * right
                found[f"{condition} {corpus} cross_entropy"] = 2 - right
        return found

    rows = [row("flat", seed, fit, 0.4 + 0.2 * seed, 0.1) for seed in (0, 1) for fit in pretrained.FITS]
    rows += [row("hidden", 0, fit, 0.4, 0.3) for fit in pretrained.FITS]
    text = pretrained.report(rows)
    assert text.startswith("2 arms, seeds 0.") and pretrained.corpora_in(rows) == ["context", "svamp"]
    both = "80.0 | 40.0 | {0} | {0} | {0} | {0} | {1} | 40.0 | 40.0 | 40.0 | 1.200 | 1.600 |"
    assert f"| flat | {both.format('10.0', 'yes')}" in text and f"| hidden | {both.format('30.0', 'no')}" in text
    assert "| flat | 40.0 | 20.0 | 5.0 |" in text and "| flat | all layers | 0.500 | 0.250 | 0.1250 |" in text
