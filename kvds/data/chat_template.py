"""Chat template of a tokenizer: a conversation → its text, and which letters of it an assistant says.

A template with ``{% generation %}`` marks them itself. Of any other, each turn of an assistant is what a rendering up
to and with it has more than one of all turns before it, with the prompt for the next; that holds where the template
writes a turn the same whatever follows, and is checked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from kvds.data.example import Message, RenderedChat, Segment
from kvds.data.rows import BadRow
from kvds.data.text_fidelity import special_pattern
from kvds.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Dialogue = list[dict[str, str]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_LAST = "--assistant_turns last: the last turn of each row alone counts"


class ChatTemplate:
    """The template of one tokenizer.

    Args:
        tokenizer: Of the run.
        turns: ``"all"`` turns of an assistant count, or the ``"last"``.

    Raises:
        InputError: there is no template, it cannot be read, or the tokenizer maps no token to its place.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turns: str = "all") -> None:
        from jinja2 import TemplateError, TemplateSyntaxError

        who = one_line(tokenizer.name_or_path)
        if not tokenizer.chat_template:
            raise InputError(
                f"tokenizer {who}: has no chat template, which conversations need; expected one of an instruct model "
                "(--tokenizer_name), or a template of your own (--chat_template FILE.jinja)"
            )
        if not tokenizer.is_fast:
            raise InputError(
                f"tokenizer {who}: maps no token to its place in the text; expected a fast one, with a tokenizer.json, "
                "for conversations (--tokenizer_name)"
            )
        self._tokenizer, self._last, self._fault = tokenizer, turns == "last", TemplateError
        template = tokenizer.chat_template
        source = template if isinstance(template, str) else template.get("default", "")
        self._marks = _GENERATION.search(source) is not None
        self._special = special_pattern(tokenizer)
        try:
            self._render([{"role": "user", "content": "a"}])
        except TemplateSyntaxError as error:
            raise InputError(
                f"chat template of {who}: line {error.lineno}: {one_line(error.message)}; expected a Jinja template "
                "(--chat_template FILE.jinja of another)"
            ) from error
        except BadRow:
            pass  # it may ask for more than a single turn
        self._writes_reasoning = self._probe()

    def _probe(self) -> bool:
        """Whether the template itself writes a field with reasoning; otherwise it stands in the content."""
        turns = (Message("user", "kvds asks"), Message("assistant", "kvds answers", "kvds reasons"))
        try:
            return "kvds reasons" in self._render(_dialogue(turns, fields=True))
        except BadRow:
            return False

    def _render(self, dialogue: Dialogue, *, prompt: bool = False) -> str:
        from jinja2 import TemplateSyntaxError

        try:
            text = self._tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=prompt)
        except TemplateSyntaxError:
            raise
        except (self._fault, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise BadRow(f"the chat template refuses it ({one_line(error)[:120]})") from error
        return str(text)

    def render(self, messages: Sequence[Message]) -> RenderedChat:
        """The text of a conversation and what counts in it.

        Raises:
            BadRow: a turn holds a special token or is left out, or the turns cannot be told apart.
        """
        for number, message in enumerate(messages, 1):
            found = self._special.search(f"{message.content}\n{message.reasoning}")
            if found:
                raise BadRow(
                    f"turn {number} ({message.role}) holds {found[0]!r}, a special token, which would be taken for one "
                    "of the chat template; expected text without"
                )
        dialogue = _dialogue(messages, fields=self._writes_reasoning)
        text = self._render(dialogue)
        self._check_all_there(text, messages)
        spoken = [number for number, message in enumerate(messages) if message.role == "assistant"]
        counted = [number for number in spoken if messages[number].counted]
        if self._last:
            counted = counted[-1:]
        if self._marks:
            bounds = self._marked(dialogue, spoken)
        else:
            bounds = {number: self._bounds(text, dialogue, number) for number in counted}
        spans = [span for number in counted for span in self._spans(text, messages[number], number, *bounds[number])]
        return RenderedChat(text[: spans[-1][1]], tuple(spans))

    def _check_all_there(self, text: str, messages: Sequence[Message]) -> None:
        place = 0
        for number, message in enumerate(messages, 1):
            said = message.content.strip()
            found = text.find(said, place)
            if found < 0:
                raise BadRow(
                    f"the chat template leaves out or changes turn {number} ({message.role}): {said!r:.60} is not in "
                    "what it writes; expected every turn there (--chat_template FILE.jinja of another)"
                )
            place = found + len(said)

    def _marked(self, dialogue: Dialogue, spoken: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Turn → begin and end of what the template itself marks as an assistant's."""
        encoded = self._tokenizer.apply_chat_template(
            dialogue, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )  # fmt: skip
        pairs = zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True)
        runs = [[place for _, place in run] for mark, run in groupby(pairs, lambda pair: pair[0]) if mark]
        if len(runs) != len(spoken):
            raise BadRow(
                f"the chat template marks {len(runs)} turns with {{% generation %}} where the assistant has "
                f"{len(spoken)}; expected each (--chat_template FILE.jinja of another)"
            )
        return {number: (run[0][0], run[-1][1]) for number, run in zip(spoken, runs, strict=True)}

    def _bounds(self, text: str, dialogue: Dialogue, number: int) -> tuple[int, int]:
        """Begin and end of a turn, by renderings of what comes before it and of what ends with it."""
        before = self._render(dialogue[:number], prompt=True)
        through = self._render(dialogue[: number + 1]) if number + 1 < len(dialogue) else text
        for what, part in (("what comes before", before), ("all up to the end of", through)):
            if not text.startswith(part):
                remedy = "" if number + 1 == len(dialogue) else f", or {_LAST}"
                raise BadRow(
                    f"the chat template is not prefix-stable: {what} turn {number + 1} (assistant) is written "
                    "otherwise by itself than in the whole conversation, so that it cannot be told where the turn "
                    f"stands; expected the same (--chat_template FILE.jinja with {{% generation %}}{remedy})"
                )
        return len(before), len(through)

    def _spans(self, text: str, message: Message, number: int, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Reasoning and answer within a turn; a line end behind its last special token is neither."""
        ends = [found.end() for found in self._special.finditer(text, begin, end)]
        if ends and not text[ends[-1] : end].strip():
            end = ends[-1]
        split = begin
        if message.reasoning:
            behind = text.find(message.reasoning, begin, end) + len(message.reasoning)
            split = text.find(message.content.strip(), behind, end) if behind >= begin + len(message.reasoning) else -1
        if split < 0 or text.find(message.content.strip(), split, end) < 0:
            raise BadRow(
                f"the chat template leaves out the reasoning or answer of turn {number + 1}: "
                f"{message.reasoning or message.content!r:.60} is not where the assistant speaks; expected it there "
                f"(--chat_template FILE.jinja of another, or {_LAST})"
            )
        spans = [(begin, split, int(Segment.RATIONALE)), (split, end, int(Segment.ANSWER))]
        return [span for span in spans if span[1] > span[0]]


def _dialogue(messages: Sequence[Message], *, fields: bool) -> Dialogue:
    """Turns as templates read them, with reasoning in a field of its own or in front of the content."""
    dialogue = []
    for message in messages:
        turn = {"role": message.role, "content": message.content}
        if message.reasoning and fields:
            turn |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
        elif message.reasoning:
            turn["content"] = f"<think>\n{message.reasoning}\n</think>\n\n{message.content.lstrip()}"
        dialogue.append(turn)
    return dialogue
