"""Display of rows as the model reads them: what each token stretch is, and the letters that its tokens stand for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from kvds.data.encoding import EncodedSample
from kvds.data.example import Example, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a terminal: prompt blue, rationale yellow, answer green.
_COLOURS = {Segment.PROMPT: "34", Segment.RATIONALE: "33", Segment.ANSWER: "32"}
_SHORT = 60


def stretches(sample: EncodedSample, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Segment, str, int]]:
    """Segment, text with special tokens, and number of tokens, one stretch after the other."""
    found = []
    pairs = zip(sample.segment_ids, sample.input_ids, strict=True)
    for segment, run in groupby(pairs, lambda pair: pair[0]):
        ids = [token for _, token in run]
        found.append((Segment(segment), tokenizer.decode(ids, clean_up_tokenization_spaces=False), len(ids)))
    return found


def one_line_of(sample: EncodedSample, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> str:
    """A row in short, on one line."""
    shown = []
    for segment, text, _ in stretches(sample, tokenizer):
        visible = repr(text)[1:-1] if text.isascii() else text.encode("unicode_escape").decode("ascii")
        if len(visible) > _SHORT:
            visible = f"{visible[: _SHORT // 2]} … {visible[-_SHORT // 2 :]}"
        shown.append(f"[{segment.name.lower()}] {visible}")
    return f"a row as the model reads it ({examples[sample.example].place}): {' '.join(shown)}"


def whole_row(
    sample: EncodedSample, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, colour: bool
) -> str:
    """A row with all its letters, its segments in colours or behind their names."""
    row = examples[sample.example]
    parts = stretches(sample, tokenizer)
    learned = sample.label_count
    lines = [f"{row.place} ({row.corpus}, {row.form}): {len(sample.input_ids)} tokens, {learned} of them learned"]
    if colour:
        lines.append("".join(f"\x1b[{_COLOURS[segment]}m{_seen(text)}\x1b[0m" for segment, text, _ in parts))
    else:
        lines += [f"[{segment.name.lower()} {count}] {_seen(text)}" for segment, text, count in parts]
    return "\n".join(lines)


def _seen(text: str) -> str:
    """A text without control characters, which a terminal would obey; line ends and tabs stay."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def segment_table(samples: Sequence[EncodedSample], examples: Sequence[Example]) -> str:
    """A line per corpus: rows, tokens of the mean and the longest row, and mean tokens of each segment."""
    corpora: dict[str, list[EncodedSample]] = {}
    for sample in samples:
        corpora.setdefault(examples[sample.example].corpus, []).append(sample)
    names = [segment.name.lower() for segment in _COLOURS]
    width = max([6, *map(len, corpora)])
    titles = "".join(f"{name:>11}" for name in ("rows", "mean", "longest", *names))
    lines = [f"{'corpus':<{width}}{titles}"]
    for corpus, rows in corpora.items():
        lengths = [len(row.input_ids) for row in rows]
        means = [sum(row.segment_ids.count(segment) for row in rows) / len(rows) for segment in _COLOURS]
        numbers = "".join(f"{mean:>11.1f}" for mean in means)
        lines.append(f"{corpus:<{width}}{len(rows):>11}{sum(lengths) / len(rows):>11.1f}{max(lengths):>11}{numbers}")
    return "\n".join(lines)
