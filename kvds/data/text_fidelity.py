"""Text fidelity: the tokens of each row are read back and compared with its text, before a run learns from them.

A character that a tokenizer does not know vanishes from what is learned and from what is judged, and no loss shows it:
``$5.00`` becomes ``500``. A text in another Unicode form (NFD under a tokenizer that composes) says the same and is
only told of.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvds.data.example import Example
from kvds.durable_files import json_text
from kvds.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("kvds")

_ROWS_AT_ONCE = 4096
_SHOWN = 8
_EXCERPT = 24


@dataclass(frozen=True)
class TextFidelity:
    """How rows compare with what their tokens say.

    Attributes:
        rows: Rows compared.
        lossy: Rows of which tokens give another text.
        lost: What such rows lose, the most frequent first.
        first: The first such row, by its position; -1 = none.
        before: Where it differs, in the row.
        after: The same place, read back.
        other_form: Rows that come back in another Unicode form, and else as they were.
        spelled: Rows that spell out a special token, which is read as ordinary text.
        special: Those tokens.
    """

    rows: int = 0
    lossy: int = 0
    lost: tuple[str, ...] = ()
    first: int = -1
    before: str = ""
    after: str = ""
    other_form: int = 0
    spelled: int = 0
    special: tuple[str, ...] = ()

    def to_json(self) -> str:
        """As a file of tokens keeps it."""
        return json_text(asdict(self))

    @staticmethod
    def from_json(text: str) -> TextFidelity:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError, TypeError: another text.
        """
        values: dict[str, Any] = json.loads(text)
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return TextFidelity(**fields)


def decode_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    """The texts of token ids, without special tokens and with every blank where it is: the one way back from tokens."""
    if not ids:
        return []
    rows = [list(row) for row in ids]
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def compare_texts(
    pairs: Sequence[Sequence[tuple[str, Sequence[int]]]], tokenizer: PreTrainedTokenizerBase
) -> TextFidelity:
    """Read tokens back and compare.

    Args:
        pairs: For each row its pieces of text, each with the token ids that were made of it.
        tokenizer: What made them.
    """
    special = special_pattern(tokenizer)
    lost: Counter[str] = Counter()
    spelled: Counter[str] = Counter()
    lossy = other_form = rows_spelled = 0
    first, before, after = -1, "", ""
    for start in range(0, len(pairs), _ROWS_AT_ONCE):
        rows = pairs[start : start + _ROWS_AT_ONCE]
        decoded = iter(decode_texts(tokenizer, [ids for row in rows for _, ids in row]))
        for position, row in enumerate(rows, start):
            found = {token for text, _ in row for token in special.findall(text)}
            rows_spelled += bool(found)
            spelled.update(found)
            changed = [(text, back) for text, back in ((text, next(decoded)) for text, _ in row) if text != back]
            broken = [(text, back) for text, back in changed if _composed(text) != _composed(back)]
            lossy += bool(broken)
            other_form += bool(changed) and not broken
            lost.update({letter for text, back in broken for letter in Counter(text) - Counter(back)})
            if broken and first < 0:
                first, (before, after) = position, _difference(*broken[0])
    return TextFidelity(
        len(pairs), lossy, _most_common(lost), first, before, after, other_form, rows_spelled, _most_common(spelled)
    )


def _most_common(counts: Counter[str]) -> tuple[str, ...]:
    return tuple(text for text, _ in counts.most_common(_SHOWN))


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What matches the text of any token that is no word, of several the longest."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted((added | set(map(str, tokenizer.all_special_tokens))) - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _difference(text: str, back: str) -> tuple[str, str]:
    """The two texts from shortly before the first letter in which they differ."""
    differ = (i for i, pair in enumerate(zip(text, back, strict=False)) if pair[0] != pair[1])
    begin = max(0, next(differ, min(len(text), len(back))) - _EXCERPT // 3)
    return text[begin : begin + _EXCERPT], back[begin : begin + _EXCERPT]


def check_texts(
    found: TextFidelity,
    examples: Sequence[Example],
    *,
    what: str,
    most: float,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Tell of rows that are not the same as tokens, and refuse too many.

    Args:
        found: Of ``examples``.
        examples: The rows.
        what: What rows they are, such as ``"training"``.
        most: The share of rows that may lose something (``--max_lossy_rows``).
        tokenizer: The run's, for the message.

    Raises:
        InputError: more of them do.
    """
    if found.spelled:
        log.warning(
            "data: %d of %d %s rows spell out special tokens (%s), which are read as ordinary text", found.spelled,
            found.rows, what, " ".join(found.special),
        )  # fmt: skip
    if found.other_form:
        log.warning(
            "data: the tokenizer writes %d of %d %s rows in another Unicode form; they are trained and judged in that",
            found.other_form, found.rows, what,
        )  # fmt: skip
    if not found.lossy:
        return
    lost = " ".join(map(_quoted, found.lost))
    place = examples[found.first].place
    told = (
        f"{found.lossy} of {found.rows} {what} rows lose characters: {lost or 'blanks or order alone'} "
        f"({place}: {_quoted(found.before)} becomes {_quoted(found.after)})"
    )
    if found.lossy > most * found.rows:
        raise InputError(
            f"max_lossy_rows={most}: as tokens of {one_line(tokenizer.name_or_path)}, {told}; expected no more than "
            "that share (--tokenizer_name of one that knows them, or a larger --max_lossy_rows to go on without them)"
        )
    log.warning("data: as tokens, %s", told)


def _quoted(text: str) -> str:
    """A text in quotes, on one line, without anything invisible."""
    return repr(text) if text.isprintable() else ascii(text)
