"""Mixture of rows, by names on the command line: files, hub data sets and the built-in problems, by weight.

A name is a corpus of :data:`kvds.data.corpora.CORPORA` (its table lists the hub names), ``arc`` (easy and challenge),
``synthetic``, or data of one's own (:mod:`kvds.data.own_rows`) in one of the formats of :mod:`kvds.data.row_formats`.
``FILE.jsonl`` is judged by ``FILE.eval.jsonl`` where that lies beside it, a data set with splits by its held-out one;
else about a tenth of the prompts, chosen by their hash, is held out.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvds.config.settings import DataSettings
from kvds.config.values import split_dataset_weight
from kvds.data.checked_rows import checked_examples
from kvds.data.corpora import CORPORA, Parts
from kvds.data.corpus_names import corpus_names, is_file, is_hub_name, is_own, is_own_file, own_file
from kvds.data.example import INVISIBLE, Example, question
from kvds.data.own_rows import AS_THEY_ARE, OwnRows, Reading, corpus_rows, own_rows
from kvds.data.rows import file_rows
from kvds.data.synthetic import synthetic_examples
from kvds.errors import InputError, near_miss, one_line

log = logging.getLogger("kvds")

HELD_OUT_OF = 10
_ARC = ("arc_easy", "arc_challenge")
# Bytes of a file that are parsed in about a second.
_SMALL = 50_000_000


# Of Unicode's compatibility forms those that mean the same.
_FORMS = {"wide", "narrow", "noBreak", "compat", "font", "initial", "medial", "final", "isolated", "vertical", "small"}
_NOT_SEEN = re.compile(f"[{INVISIBLE}]")


@dataclass(frozen=True)
class Mixture:
    """Rows of all corpora, in a fixed order, and how many malformed ones were left out.

    Attributes:
        examples: The rows.
        skipped: File → malformed rows skipped.
        counts: Name as given, without weight → rows taken from it; fewer than its share where it has no more.
        available: Name → rows that it could have given.
        held_out: Name → rows left out beside those, whose prompt is held out.
        recognised: Name of one's own data → its format, and how that was found.
    """

    examples: list[Example]
    skipped: dict[str, int]
    counts: dict[str, int] = field(default_factory=dict)
    available: dict[str, int] = field(default_factory=dict)
    held_out: dict[str, int] = field(default_factory=dict)
    recognised: dict[str, str] = field(default_factory=dict)


def load_mixture(
    datasets: Sequence[str],
    split: str,
    *,
    data_dir: str | None = None,
    subset_size: int | None = None,
    seed: int = 0,
    on_bad_row: str = "error",
    synthetic_problems: int = 1000,
    held_out: Iterable[Example] = (),
    reading: Reading = AS_THEY_ARE,
) -> Mixture:
    """Load the corpora that ``datasets`` names and mix them.

    With a ``subset_size`` of N, a corpus of weight w gives ``N · w / Σw`` rows (all it has where those are fewer).
    Without one and with unequal weights, the mixture is as large as it can be in the proportion of the weights without
    repeating a row; with equal weights every row is taken. Which rows, is drawn by ``seed``. The eval split is never
    thinned out.

    Args:
        datasets: ``NAME`` or ``NAME:WEIGHT`` (default 1), see the module.
        split: ``"train"`` or ``"eval"``.
        data_dir: Folder with the publishers' files; None = the hub, through ``datasets``.
        subset_size: Rows to train on in all.
        seed: Of the built-in problems and of which rows a subset takes.
        on_bad_row: ``"error"``, or ``"skip"`` (and count).
        synthetic_problems: Size of the built-in training corpus.
        held_out: Rows to judge by, of whatever corpus: what asks the same (:func:`prompt_key`) is left out of training.
        reading: How one's own data are read.

    Raises:
        InputError: unknown corpus, missing file, malformed row, or no row left of a corpus.
    """
    weights = _weights(datasets)
    called = corpus_names(weights, data_dir)
    columns = reading.columns_of(datasets)
    shares = {} if subset_size is None or split == "eval" else _shares(weights, subset_size)
    skipped: dict[str, int] = {}
    recognised: dict[str, str] = {}
    parts: dict[str, list[Example]] = {}
    for name in weights:
        if name == "synthetic":
            parts[name] = synthetic_examples(split, problems=synthetic_problems, seed=seed)
        elif is_own(name):
            source = own_rows(name, split, data_dir=data_dir, columns=columns[name], reading=reading, seed=seed)
            taken = reading.held_out_rows if split == "eval" else shares.get(name)
            take = taken if reading.streaming else None
            parts[name], recognised[name] = _own(source, called[name], split, on_bad_row, skipped, take)
        else:
            members = _ARC if name == "arc" else (name,)
            parts[name] = [row for member in members for row in _corpus(member, split, data_dir, on_bad_row, skipped)]
        if not parts[name] and split == "eval" and reading.streaming:
            raise InputError(
                f"datasets={name}: none of its rows is held out; expected a tenth of the prompts, by their hash, or "
                "rows of their own (FILE.eval.jsonl, OWNER/NAME@TRAIN,EVAL), or --eval_subset_size 0"
            )
        if not parts[name]:
            raise InputError(
                f"datasets={name}: no usable row in its {split} split ({sum(skipped.values())} malformed rows were "
                "skipped); expected at least one (look at the file, or --on_bad_row error to see what is wrong)"
            )
    found = _counts(parts)
    if split == "train":
        parts = _without(parts, held_out)
    available = _counts(parts)
    if split == "train":
        parts = _weigh(parts, weights, subset_size, seed)
    examples = [example for rows in parts.values() for example in rows]
    left_out = {name: found[name] - count for name, count in available.items()}
    return Mixture(examples, skipped, _counts(parts), available, left_out, recognised)


def prompt_key(prompt: str) -> str:
    """A prompt in the form in which two ask the same: without case, repeated blanks, letters that nobody sees and
    Unicode's forms. A raised or lowered digit, or a fraction, is another number than its digits: ``2²`` is not ``22``.
    """
    seen = _NOT_SEEN.sub("", unicodedata.normalize("NFC", prompt))
    alike = "".join(unicodedata.normalize("NFKC", c) if _is_form(c) else c for c in seen)
    return " ".join(unicodedata.normalize("NFC", alike.casefold()).split())


def _is_form(letter: str) -> bool:
    """Whether a letter is another only in how it is drawn."""
    kind, tag, _ = unicodedata.decomposition(letter).partition(">")
    return bool(tag) and kind.removeprefix("<") in _FORMS


def _counts(parts: dict[str, list[Example]]) -> dict[str, int]:
    return {name: len(rows) for name, rows in parts.items()}


def _without(parts: dict[str, list[Example]], held_out: Iterable[Example]) -> dict[str, list[Example]]:
    """Training rows whose prompt no held-out row asks, whichever corpora or files the two come from."""
    asked = {prompt_key(question(row)) for row in held_out}
    if not asked:
        return parts
    left = {name: [row for row in rows if prompt_key(question(row)) not in asked] for name, rows in parts.items()}
    for name, rows in left.items():
        if not rows:
            raise InputError(
                f"datasets={name}: the prompts of all {len(parts[name])} training rows are held out; expected other "
                "rows to learn from than to be judged by (another file, or other rows beside it)"
            )
    return left


def check_rows(cfg: DataSettings, seed: int) -> None:
    """Read the rows that lie on this machine, unless they are many: a fault is told before anything heavy is imported.

    Raises:
        InputError: as :func:`load_mixture`.
    """
    if cfg.streaming:
        return
    names = [name for name in _weights(cfg.datasets) if _is_small(name, cfg.data_dir)]
    specs = [spec for spec in cfg.datasets if split_dataset_weight(spec)[0] in names]
    columns = Reading.of(cfg).columns_of(cfg.datasets)
    reading = replace(Reading.of(cfg), columns=tuple(columns[split_dataset_weight(spec)[0]] for spec in specs))
    for split in ("train", "eval") if cfg.eval_subset_size else ("train",):
        if specs:
            load_mixture(
                specs, split, data_dir=cfg.data_dir, seed=seed, on_bad_row=cfg.on_bad_row, synthetic_problems=1,
                reading=reading,
            )  # fmt: skip


def _is_small(name: str, data_dir: str | None) -> bool:
    if is_hub_name(name):
        return False
    if is_own_file(name):
        path = own_file(name, data_dir)
        return not path.is_dir() and (not is_file(path) or path.stat().st_size <= _SMALL)
    return data_dir is not None or name == "synthetic"


def first_per_corpus(examples: Sequence[Example], count: int) -> list[Example]:
    """The first ``count`` rows of each corpus, in order; 0: all."""
    taken: dict[str, int] = {}
    chosen = []
    for example in examples:
        taken[example.corpus] = taken.get(example.corpus, 0) + 1
        if not count or taken[example.corpus] <= count:
            chosen.append(example)
    return chosen


def _weights(datasets: Sequence[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for spec in datasets:
        name, weight = split_dataset_weight(spec)
        if not is_own(name):
            known = [*CORPORA, "arc", "synthetic"]
            if name not in known:
                raise InputError(
                    f"datasets={one_line(name)}: unknown corpus{near_miss(name, known)}; "
                    f"expected one of {', '.join(known)}, OWNER/NAME of the hub, or a file or folder of your own "
                    "(.jsonl .json .parquet .csv)"
                )
        weights[name] = weights.get(name, 0.0) + weight
    if "arc" in weights:
        for member in _ARC:
            if member in weights:
                raise InputError(f"datasets={member}: arc holds its rows already; expected one of the two")
    return weights


def _shares(weights: dict[str, float], subset_size: int) -> dict[str, int]:
    """Rows of each name. Rounded sums instead of rounded shares: they add up to ``subset_size``."""
    total = sum(weights.values())
    bounds = [round(subset_size * sum(list(weights.values())[:i]) / total) for i in range(len(weights) + 1)]
    counts = {name: bounds[i + 1] - bounds[i] for i, name in enumerate(weights)}
    for name, count in counts.items():
        if not count:
            raise InputError(
                f"subset_size={subset_size}: leaves {name} no row beside {len(weights) - 1} others; expected "
                f"at least one of each (--subset_size {math.ceil(total / min(weights.values()))} or other weights)"
            )
    return counts


def _weigh(
    parts: dict[str, list[Example]], weights: dict[str, float], subset_size: int | None, seed: int
) -> dict[str, list[Example]]:
    if subset_size is not None:
        counts = _shares(weights, subset_size)
    elif len(set(weights.values())) == 1:
        return parts
    else:
        scale = min(len(parts[name]) / weight for name, weight in weights.items())
        counts = {name: max(1, round(scale * weight)) for name, weight in weights.items()}
    chosen = {}
    for name, rows in parts.items():
        if counts[name] > len(rows):
            log.warning("data: %s has %d of the %d rows asked for; all are taken", name, len(rows), counts[name])
        # A file's name, not its folder: the same rows are taken where it lies somewhere else.
        order = random.Random(f"{seed} {Path(name).name}").sample(range(len(rows)), min(counts[name], len(rows)))
        chosen[name] = [rows[position] for position in sorted(order)]
    return chosen


def _corpus(name: str, split: str, data_dir: str | None, on_bad_row: str, skipped: dict[str, int]) -> Iterator[Example]:
    """Rows of a known corpus, from its publisher's file or the hub."""
    corpus = CORPORA[name]
    if data_dir is None:
        source = f"{corpus.hub_name}/{corpus.hub_splits[split]}"
        return checked_examples(corpus.read, corpus_rows(name, corpus, split), source, name, on_bad_row, skipped)
    path = Path(data_dir) / corpus.files[split]

    def read(row: dict[str, Any]) -> Parts | None:
        return corpus.read(row) if corpus.split_of is None or corpus.split_of(row) == split else None

    return checked_examples(read, file_rows(path), str(path), name, on_bad_row, skipped)


def _own(
    source: OwnRows, corpus: str, split: str, on_bad_row: str, skipped: dict[str, int], take: int | None
) -> tuple[list[Example], str]:
    """Rows of one's own data, less those of the other split, and how they were recognised.

    Args:
        source: The rows.
        corpus: What they are called.
        split: ``"train"`` or ``"eval"``.
        on_bad_row: As :func:`load_mixture`.
        skipped: Counted up.
        take: Rows at most, the first; None = all, so that a tenth of the prompts can be held out whatever they are.
    """
    read, rows = source.recognised(on_bad_row)
    found = checked_examples(read, rows, source.label, corpus, on_bad_row, skipped)
    if take is not None:
        mine = (row for row in found if source.separate or (_drawn(question(row)) == (split == "eval")))
        return list(itertools.islice(mine, take)), read.why
    examples = list(found)
    if source.separate:
        return examples, read.why
    held_out = _held_out({question(example) for example in examples})
    if split == "eval" and examples and not held_out:
        raise InputError(
            f"{source.label}: all rows have the same prompt, so that none can be held out; expected at least 2 "
            f"prompts, or held-out rows in {source.beside} (or --eval_subset_size 0)"
        )
    return [example for example in examples if (question(example) in held_out) == (split == "eval")], read.why


def _hash(prompt: str) -> int:
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16)


def _drawn(prompt: str) -> bool:
    return _hash(prompt) % HELD_OUT_OF == 0


def _held_out(prompts: set[str]) -> set[str]:
    """About a tenth of the prompts, by content: neither order nor other rows move one from split to split.

    A small file gives at least one and keeps at least one; a single prompt is not held out.
    """
    hashes = {prompt: _hash(prompt) for prompt in prompts}
    chosen = set(filter(_drawn, prompts))
    if len(prompts) < 2:
        return set()
    if not chosen:
        return {min(prompts, key=hashes.__getitem__)}
    return chosen - {max(prompts, key=hashes.__getitem__)} if chosen == prompts else chosen
