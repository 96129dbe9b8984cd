"""Mixture of rows, by names on the command line: files, hub data sets and the built-in problems, by weight.

A name is a corpus of :data:`kvds.data.corpora.CORPORA` (its table lists the hub names), ``arc`` (easy and challenge),
``synthetic``, or a file of one's own with ``prompt``, ``rationale`` and ``answer``. ``FILE.jsonl`` is judged by
``FILE.eval.jsonl`` where that lies beside it; else about a tenth of its prompts, chosen by their hash, is held out.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvds.config.settings import DataSettings
from kvds.config.values import split_dataset_weight
from kvds.data.corpora import CORPORA, Corpus, Parts, plain
from kvds.data.corpus_names import corpus_names, held_out_file, is_file, is_own_file, own_file
from kvds.data.example import ANSWER_MARK, INVISIBLE, Example
from kvds.data.rows import BadRow, file_rows
from kvds.data.synthetic import synthetic_examples
from kvds.errors import InputError, near_miss, one_line

log = logging.getLogger("kvds")

HELD_OUT_OF = 10
_ARC = ("arc_easy", "arc_challenge")
# Bytes of a file that are parsed in about a second.
_SMALL = 50_000_000
# What chat templates begin or end a turn with: ChatML, Llama 3 and 4, Zephyr and Phi, Llama 2 and Mistral, Gemma,
# DeepSeek, Granite, Command R, gpt-oss.
_CHAT_MARK = re.compile(
    r"<\|im_(?:start|end)\|>|<\|(?:start_header_id|header_start|eot_id|eot)\|>|<\|(?:system|user|assistant)\|>|"
    r"\[/?INST\]|<(?:start|end)_of_turn>|<\|start_of_role\|>|<\|START_OF_TURN_TOKEN\|>|<\|start\|>|"
    "<\N{FULLWIDTH VERTICAL LINE}(?:User|Assistant)\N{FULLWIDTH VERTICAL LINE}>"
)


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
    """

    examples: list[Example]
    skipped: dict[str, int]
    counts: dict[str, int] = field(default_factory=dict)
    available: dict[str, int] = field(default_factory=dict)
    held_out: dict[str, int] = field(default_factory=dict)


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

    Raises:
        InputError: unknown corpus, missing file, malformed row, or no row left of a corpus.
    """
    weights = _weights(datasets)
    called = corpus_names(weights, data_dir)
    skipped: dict[str, int] = {}
    parts: dict[str, list[Example]] = {}
    for name in weights:
        if name == "synthetic":
            parts[name] = synthetic_examples(split, problems=synthetic_problems, seed=seed)
        elif is_own_file(name):
            parts[name] = _own_file(own_file(name, data_dir), called[name], split, on_bad_row, skipped)
        else:
            members = _ARC if name == "arc" else (name,)
            parts[name] = [row for member in members for row in _corpus(member, split, data_dir, on_bad_row, skipped)]
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
    return Mixture(examples, skipped, _counts(parts), available, left_out)


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
    asked = {prompt_key(row.prompt) for row in held_out}
    if not asked:
        return parts
    left = {name: [row for row in rows if prompt_key(row.prompt) not in asked] for name, rows in parts.items()}
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
    specs = [
        spec for name, spec in zip(_weights(cfg.datasets), cfg.datasets, strict=True) if _is_small(name, cfg.data_dir)
    ]
    for split in ("train", "eval") if cfg.eval_subset_size else ("train",):
        if specs:
            load_mixture(
                specs, split, data_dir=cfg.data_dir, seed=seed, on_bad_row=cfg.on_bad_row, synthetic_problems=1
            )


def _is_small(name: str, data_dir: str | None) -> bool:
    if is_own_file(name):
        path = own_file(name, data_dir)
        return not is_file(path) or path.stat().st_size <= _SMALL
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
        if not is_own_file(name):
            known = [*CORPORA, "arc", "synthetic"]
            if name not in known:
                raise InputError(
                    f"datasets={one_line(name)}: unknown corpus{near_miss(name, known)}; "
                    f"expected one of {', '.join(known)} or a FILE.jsonl"
                )
        weights[name] = weights.get(name, 0.0) + weight
    if "arc" in weights:
        for member in _ARC:
            if member in weights:
                raise InputError(f"datasets={member}: arc holds its rows already; expected one of the two")
    return weights


def _weigh(
    parts: dict[str, list[Example]], weights: dict[str, float], subset_size: int | None, seed: int
) -> dict[str, list[Example]]:
    total = sum(weights.values())
    if subset_size is not None:
        # Rounded sums instead of rounded shares: the counts add up to subset_size.
        bounds = [round(subset_size * sum(list(weights.values())[:i]) / total) for i in range(len(weights) + 1)]
        counts = {name: bounds[i + 1] - bounds[i] for i, name in enumerate(weights)}
        for name, count in counts.items():
            if not count:
                raise InputError(
                    f"subset_size={subset_size}: leaves {name} no row beside {len(weights) - 1} others; expected "
                    f"at least one of each (--subset_size {math.ceil(total / min(weights.values()))} or other weights)"
                )
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
        return _examples(corpus.read, _hub_rows(name, corpus, split), source, name, on_bad_row, skipped)
    path = Path(data_dir) / corpus.files[split]

    def read(row: dict[str, Any]) -> Parts | None:
        return corpus.read(row) if corpus.split_of is None or corpus.split_of(row) == split else None

    return _examples(read, file_rows(path), str(path), name, on_bad_row, skipped)


def _own_file(path: Path, corpus: str, split: str, on_bad_row: str, skipped: dict[str, int]) -> list[Example]:
    """Rows of a file with prompt, rationale and answer, less those of the other split."""
    beside = held_out_file(path)
    separate = is_file(beside)
    source = beside if separate and split == "eval" else path
    examples = list(_examples(plain, file_rows(source), str(source), corpus, on_bad_row, skipped))
    if separate:
        return examples
    held_out = _held_out({example.prompt for example in examples})
    if split == "eval" and examples and not held_out:
        raise InputError(
            f"{path}: all rows have the same prompt, so that none can be held out; expected at least 2 prompts, "
            f"or held-out rows in {beside.name} (or --eval_subset_size 0)"
        )
    return [example for example in examples if (example.prompt in held_out) == (split == "eval")]


def _held_out(prompts: set[str]) -> set[str]:
    """About a tenth of the prompts, by content: neither order nor other rows move one from split to split.

    A small file gives at least one and keeps at least one; a single prompt is not held out.
    """
    hashes = {prompt: int(hashlib.sha256(prompt.encode()).hexdigest(), 16) for prompt in prompts}
    chosen = {prompt for prompt, value in hashes.items() if value % HELD_OUT_OF == 0}
    if len(prompts) < 2:
        return set()
    if not chosen:
        return {min(prompts, key=hashes.__getitem__)}
    return chosen - {max(prompts, key=hashes.__getitem__)} if chosen == prompts else chosen


def _examples(
    read: Callable[[dict[str, Any]], Parts | None],
    rows: Iterable[tuple[int, Any]],
    source: str,
    corpus: str,
    on_bad_row: str,
    skipped: dict[str, int],
) -> Iterator[Example]:
    """Read rows that are this split's (``read`` gives None for others); a malformed one is an error or counted."""
    name = Path(source).name if "." in Path(source).name else source
    for line, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            if not isinstance(row, dict):
                raise BadRow(f"holds {row!r:.40}; expected an object with named fields")
            parts = read(row)
            if parts is None:
                continue
            prompt, rationale, answer, *teachers = parts
            _check_text(prompt, rationale, answer)
            if teachers:
                _check_text(prompt, teachers[0], answer)
        except BadRow as fault:
            if on_bad_row == "error":
                raise InputError(f"{source}:{line}: {fault} (mend the row, or --on_bad_row skip)") from fault
            skipped[source] = skipped.get(source, 0) + 1
            continue
        yield Example(prompt, rationale, answer, corpus, f"{name}:{line}", *teachers)


def _check_text(prompt: str, rationale: str, answer: str) -> None:
    for name, text in (("rationale", rationale), ("answer", answer)):
        if ANSWER_MARK in text:
            raise BadRow(f"the {name} holds {ANSWER_MARK!r}, which announces the answer; expected it nowhere else")
    chat = _CHAT_MARK.search(f"{prompt}\n{rationale}\n{answer}")
    if chat:
        raise BadRow(
            f"holds {chat[0]!r}, as if rendered with a chat template, which would be read as ordinary letters; "
            "expected plain prompt, rationale and answer"
        )
    try:
        f"{prompt}{rationale}{answer}".encode()
    except UnicodeEncodeError as error:
        raise BadRow("holds half of a surrogate pair; expected text that UTF-8 can write") from error


def _hub_rows(name: str, corpus: Corpus, split: str) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(corpus.hub_name, corpus.hub_config, split=corpus.hub_splits[split])
    except Exception as error:  # the hub's client raises a dozen kinds, most of them for a missing network
        raise InputError(
            f"datasets={name}: {corpus.hub_name} could not be loaded from the hub or its cache "
            f"({one_line(error)[:160]}); without internet, expected --data_dir FOLDER with {corpus.files[split]}, "
            "or what `kvds prefetch RECIPE --to DIR` brings where there is some"
        ) from error
    yield from ((number, dict(row)) for number, row in enumerate(rows, 1))
