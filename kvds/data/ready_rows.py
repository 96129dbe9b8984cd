"""Rows ready to be tokenised: conversations written in the tokenizer's chat template, texts cut to the length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvds.data.chat_template import ChatTemplate
from kvds.data.example import Example
from kvds.data.rows import BadRow
from kvds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# No token of a real tokenizer has more letters, but for runs of blanks: more than this are not even looked at.
_LETTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class ReadyRows:
    """Rows that can be tokenised.

    Attributes:
        examples: They, in their order.
        skipped: File → conversations that the template cannot write.
        cut: Texts of which only the beginning is left.
    """

    examples: list[Example]
    skipped: dict[str, int] = field(default_factory=dict)
    cut: int = 0


def ready_rows(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    assistant_turns: str = "all",
    on_bad_row: str = "error",
) -> ReadyRows:
    """Write conversations, and cut texts: alone among rows they teach nothing wrong where their end is missing.

    Args:
        examples: Rows.
        tokenizer: Of the run.
        max_length: Tokens of a row.
        assistant_turns: ``"all"`` that an assistant says is learned, or the ``"last"``.
        on_bad_row: ``"error"``, or ``"skip"`` (and count).

    Raises:
        InputError: conversations without a usable chat template, or one that cannot be written (unless skipped).
    """
    chats = any(example.form == "messages" for example in examples)
    template = ChatTemplate(tokenizer, assistant_turns) if chats else None
    ready, cut = [], 0
    skipped: dict[str, int] = {}
    for example in examples:
        if example.form == "messages" and template is not None:
            try:
                ready.append(replace(example, rendered=template.render(example.messages)))
            except BadRow as fault:
                if on_bad_row == "error":
                    raise InputError(f"{example.place}: {fault} (mend the row, or --on_bad_row skip)") from fault
                file = example.place.rpartition(":")[0]
                skipped[file] = skipped.get(file, 0) + 1
        elif example.form == "text":
            text = _beginning(example.answer, tokenizer, max_length)
            cut += len(text) < len(example.answer)
            ready.append(replace(example, answer=text, ends=len(text) == len(example.answer)))
        else:
            ready.append(example)
    return ReadyRows(ready, skipped, cut)


def _beginning(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """As much of a text as ``max_length`` tokens hold, with one that begins it and one that ends it; cut at a blank
    where there is one.
    """
    room, whole = max(1, max_length - 2), len(text)
    if whole <= room // 4:  # a letter is at most four bytes, and a token at least one
        return text
    text = text[: room * _LETTERS_PER_TOKEN]
    while True:
        count = len(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])
        if count <= room:
            return text
        keep = min(len(text) - 1, max(1, len(text) * room // count))
        blank = max(text.rfind(" ", keep // 2, keep), text.rfind("\n", keep // 2, keep))
        text = text[: blank if blank > 0 else keep]
        if not text:
            return text
