"""From names on the command line to rows: files, hub data sets and the built-in problems, mixed by weight."""

from __future__ import annotations

import difflib
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvds.config import split_dataset_weight
from kvds.data.corpora import CORPORA, BadRow, Corpus, plain
from kvds.data.example import Example
from kvds.data.synthetic import synthetic_examples
from kvds.errors import InputError

HELD_OUT_TENTH = 10


@dataclass(frozen=True)
class Mixture:
    """Rows of all corpora, in a fixed order, and how many malformed ones were left out.

    Attributes:
        examples: The rows.
        skipped: File → malformed rows skipped.
    """

    examples: list[Example]
    skipped: dict[str, int]


def load_mixture(
    datasets: Sequence[str],
    split: str,
    *,
    data_dir: str | None = None,
    subset_size: int | None = None,
    seed: int = 0,
    on_bad_row: str = "error",
    synthetic_problems: int = 1000,
) -> Mixture:
    """Load the corpora that ``datasets`` names and mix them.

    With a ``subset_size`` of N, a corpus of weight w gives ``N · w / Σw`` rows (all it has where those are fewer). Without
    one and with unequal weights, the mixture is as large as it can be in the proportion of the weights without repeating a
    row; with equal weights every row is taken. Which rows, is drawn by ``seed``. The eval split is never thinned out.

    Args:
        datasets: ``NAME`` or ``NAME:WEIGHT``: a known corpus, ``arc`` (both), ``synthetic``, or a ``.jsonl`` file.
        split: ``"train"`` or ``"eval"``. A ``.jsonl`` file of one's own is split by content: each tenth row is held out.
        data_dir: Folder with the publishers' files; None = the hub, through ``datasets``.
        subset_size: Rows to train on in all.
        seed: Of the built-in problems and of which rows a subset takes.
        on_bad_row: ``"error"``, or ``"skip"`` (and count).
        synthetic_problems: Size of the built-in training corpus.

    Raises:
        InputError: unknown corpus, missing file, malformed row, or no row left.
    """
    weighted: list[tuple[str, float]] = []
    for spec in datasets:
        name, weight = split_dataset_weight(spec)
        names = ("arc_easy", "arc_challenge") if name == "arc" else (name,)
        weighted += [(n, weight / len(names)) for n in names]
    skipped: dict[str, int] = {}
    parts: list[list[Example]] = []
    for name, _ in weighted:
        rows = list(_rows(name, split, data_dir, seed, synthetic_problems, on_bad_row, skipped))
        if not rows:
            raise InputError(f"datasets={name}: no usable row in its {split} split; expected at least one (see --on_bad_row)")
        parts.append(rows)
    if split == "train":
        parts = _weigh(parts, [weight for _, weight in weighted], subset_size, seed)
    return Mixture([example for rows in parts for example in rows], skipped)


def _weigh(parts: list[list[Example]], weights: list[float], subset_size: int | None, seed: int) -> list[list[Example]]:
    total = sum(weights)
    if subset_size is not None:
        bounds = [round(subset_size * sum(weights[:i]) / total) for i in range(len(weights) + 1)]
        counts = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    elif len(set(weights)) == 1:
        return parts
    else:
        scale = min(len(rows) / weight for rows, weight in zip(parts, weights, strict=True))
        counts = [max(1, round(scale * weight)) for weight in weights]
    chosen = []
    for rows, count in zip(parts, counts, strict=True):
        order = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
        chosen.append([rows[position] for position in order])
    return chosen


def _rows(
    name: str, split: str, data_dir: str | None, seed: int, problems: int, on_bad_row: str, skipped: dict[str, int]
) -> Iterator[Example]:
    if name == "synthetic":
        yield from synthetic_examples(split, problems=problems, seed=seed)
        return
    if name.endswith((".jsonl", ".json")):
        path = Path(name) if data_dir is None or Path(name).exists() else Path(data_dir) / name
        corpus, located = Corpus(plain, {}, ("", None, {})), _file_rows(path)
        label = path.stem
    elif name in CORPORA:
        corpus, label = CORPORA[name], name
        located = _hub_rows(name, corpus, split) if data_dir is None else _file_rows(Path(data_dir) / corpus.files[split])
    else:
        known = [*CORPORA, "arc", "synthetic"]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"datasets={name}: unknown corpus; expected one of {', '.join(known)} or a FILE.jsonl{hint}")
    for position, (place, row) in enumerate(located):
        if corpus.skip is not None and data_dir is not None and corpus.skip(split, position):
            continue
        try:
            if isinstance(row, BadRow):
                raise row
            if not isinstance(row, dict):
                raise BadRow(f"a {type(row).__name__}; expected an object")
            example = Example(*corpus.read(row), label, place)
        except BadRow as fault:
            if on_bad_row == "error":
                raise InputError(f"{place}: {fault} (mend the row, or --on_bad_row skip)") from fault
            file = place.rpartition(":")[0]
            skipped[file] = skipped.get(file, 0) + 1
            continue
        if corpus.read is not plain or _is_held_out(example) == (split == "eval"):
            yield example


def _is_held_out(example: Example) -> bool:
    return int(hashlib.sha256(example.prompt.encode()).hexdigest(), 16) % HELD_OUT_TENTH == 0


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and parsed row (or the fault) of each row of a JSON-lines file or a JSON list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the corpus file there (see --data_dir)") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); expected JSON lines") from error
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error}); expected a list of rows") from error
        if not isinstance(rows, list):
            raise InputError(f"{path}: holds a {type(rows).__name__}; expected a list of rows")
        yield from ((f"{path}:row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"{path}:{number}", BadRow(f"not JSON ({error})")


def _hub_rows(name: str, corpus: Corpus, split: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    hub_name, configuration, splits = corpus.hub
    try:
        rows = load_dataset(hub_name, configuration, split=splits[split])
    except Exception as error:  # the hub's client raises a dozen kinds, most of them for a missing network
        raise InputError(
            f"datasets={name}: {hub_name} could not be loaded from the hub or its cache ({' '.join(str(error).split())[:160]}); "
            f"without internet, give --data_dir FOLDER with {corpus.files[split]}"
        ) from error
    yield from ((f"{hub_name}/{splits[split]}:{number}", dict(row)) for number, row in enumerate(rows, 1))
