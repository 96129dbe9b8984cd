"""Encoding of rows as token ids: every token knows its segment.

The segments of a row, such as ``prompt⏎ rationale⏎ #### answer<end>``, are tokenised one by one and joined, so that no
token straddles two, and a generated completion starts from exactly the ids that training puts before it. A
begin-of-text token stands in front, as part of the prompt, where the tokenizer itself puts one. A conversation has the
tokens that its rendered text has as a whole, special tokens as such; each belongs where it begins.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from kvds.data.example import Example, Segment, answer_text, prompt_text, rationale_text
from kvds.data.reasoning_steps import encode_reasoning_steps, reasoning_step_ids
from kvds.data.text_fidelity import TextFidelity, compare_texts, special_pattern
from kvds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedSample:
    """One row as tokens.

    Attributes:
        input_ids: Token ids.
        segment_ids: Their :class:`Segment`, as many.
        example: Position of the row in the list that was encoded.
        reasoning_step_ids: The reasoning step of each token, counted from 1, 0 = none; empty where none were asked for.
        teacher_text: The row as the teacher reads it; None = the same text.
        sampled: The student wrote the completion itself: no task loss counts it.
    """

    input_ids: tuple[int, ...]
    segment_ids: tuple[int, ...]
    example: int
    reasoning_step_ids: tuple[int, ...] = ()
    teacher_text: EncodedSample | None = None
    sampled: bool = False

    @property
    def reasoning_step_count(self) -> int:
        """Reasoning steps that both texts have."""
        own = max(self.reasoning_step_ids, default=0)
        return own if self.teacher_text is None else min(own, self.teacher_text.reasoning_step_count)

    @property
    def label_count(self) -> int:
        """Tokens that the task loss counts: rationale and answer, never the first of a row (nothing predicts it)."""
        return 0 if self.sampled else self.taught_count

    @property
    def taught_count(self) -> int:
        """Tokens that logit distillation counts: those of the task loss, and those that the student wrote itself."""
        return sum(segment >= Segment.RATIONALE for segment in self.segment_ids[1:])


def prompt_length(sample: EncodedSample) -> int:
    """Tokens before what a model is to write: of a conversation all up to the last turn."""
    behind = sample.segment_ids[::-1]
    return len(behind) - behind.index(Segment.PROMPT) if Segment.PROMPT in behind else 0


@dataclass(frozen=True)
class EncodedCorpus:
    """Rows as tokens, without those over the length.

    Attributes:
        samples: The rows that fit.
        too_long: How many did not.
        fidelity: What the tokens of the samples say, against their text; empty where they were not compared.
    """

    samples: Sequence[EncodedSample]
    too_long: int
    fidelity: TextFidelity = field(default_factory=TextFidelity)


def _segments(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose: rows over the length are counted by the caller, a warning for the first of them says nothing.
    # split_special_tokens: an end-of-text token that a row spells out is text; only what is put there ends it.
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return tokenizer(texts, **options)["input_ids"] if texts else []


def prompt_ids(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts alone, exactly those that training puts before the completion."""
    start = [tokenizer.bos_token_id] if _has_start(tokenizer) else []
    return [start + ids for ids in _segments([prompt_text(example) for example in examples], tokenizer)]


def _has_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a begin-of-text token in front (Llama's does, GPT-2's and Qwen2's do not)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def compare_rows(
    samples: Sequence[EncodedSample], examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> TextFidelity:
    """What the tokens of ``samples`` say against the texts of the rows that they were made of, their teacher's, too."""

    pattern, special = special_pattern(tokenizer), set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    def pieces(sample: EncodedSample, rationale: str | None = None) -> list[tuple[str, Sequence[int]]]:
        row = examples[sample.example]
        if row.rendered is not None:
            return _between_specials(pattern.split(row.rendered.text), sample.input_ids, special)
        row = row if rationale is None else replace(row, rationale=rationale)
        ends = [bisect_right(sample.segment_ids, segment) for segment in (Segment.PROMPT, Segment.RATIONALE)]
        ids = sample.input_ids
        own: list[tuple[str, Sequence[int]]] = [
            (prompt_text(row), ids[: ends[0]]),
            (rationale_text(row), ids[ends[0] : ends[1]]),
            (answer_text(row), ids[ends[1] : len(ids) - row.ends]),
        ]
        return own if sample.teacher_text is None else own + pieces(sample.teacher_text, row.teacher_rationale)

    found = compare_texts([pieces(sample) for sample in samples], tokenizer)
    return replace(found, first=samples[found.first].example) if found.lossy else found


def _between_specials(
    texts: Sequence[str], ids: Sequence[int], special: Collection[int]
) -> list[tuple[str, Sequence[int]]]:
    """What stands between the special tokens of a rendered conversation, each text with its tokens."""
    texts = [text for text in texts if text]
    runs = [list(run) for is_special, run in groupby(ids, special.__contains__) if not is_special]
    if len(texts) == len(runs):
        return list(zip(texts, runs, strict=True))
    return [("".join(texts), [token for run in runs for token in run])]


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, *, reasoning_steps: bool = False
) -> EncodedCorpus:
    """Tokenise all rows at once, such as ``prompt⏎ | rationale⏎ | #### answer<end>``.

    Args:
        examples: Rows, of conversations rendered ones (:func:`kvds.data.ready_rows.ready_rows`).
        tokenizer: With an end-of-text token.
        max_length: Tokens; rows with more are left out and counted, never cut (a cut row would teach a wrong answer).
        reasoning_steps: Also number them, and encode the teacher's own text where a row has one.

    Raises:
        InputError: the tokenizer has no end-of-text token, so that no answer could end; or cannot number steps.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path}: has no end-of-text token; expected an eos_token, which ends each "
            "answer (name another with --tokenizer_name)"
        )
    plain = [position for position, example in enumerate(examples) if example.form != "messages"]
    chats = [position for position, example in enumerate(examples) if example.form == "messages"]
    encoded = {
        **_encode_plain(plain, [examples[i] for i in plain], tokenizer, reasoning_steps),
        **_encode_chats(chats, [examples[i] for i in chats], tokenizer, reasoning_steps),
    }
    samples = [encoded[i] for i in range(len(examples)) if len(encoded[i].input_ids) <= max_length]
    if reasoning_steps:
        samples = _with_teachers_text(samples, examples, tokenizer, max_length)
    return EncodedCorpus(samples, len(examples) - len(samples))


def _encode_plain(
    positions: Sequence[int], rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, reasoning_steps: bool
) -> dict[int, EncodedSample]:
    """Position → row, of those whose segments follow each other."""
    end = tokenizer.eos_token_id
    texts = [rationale_text(example) for example in rows]
    prompts = prompt_ids(rows, tokenizer)
    rationales, numbers = (
        encode_reasoning_steps(texts, tokenizer) if reasoning_steps else (_segments(texts, tokenizer), None)
    )
    answers = _segments([answer_text(example) for example in rows], tokenizer)
    samples = {}
    parts = zip(positions, rows, prompts, rationales, answers, strict=True)
    for number, (position, row, prompt, rationale, answer) in enumerate(parts):
        answer = [*answer, end] if row.ends else answer
        lengths = ((Segment.PROMPT, prompt), (Segment.RATIONALE, rationale), (Segment.ANSWER, answer))
        segments = tuple(int(segment) for segment, ids in lengths for _ in ids)
        own = () if numbers is None else ((0,) * len(prompt) + numbers[number] + (0,) * len(answer))
        samples[position] = EncodedSample((*prompt, *rationale, *answer), segments, position, own)
    return samples


def _encode_chats(
    positions: Sequence[int], rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, reasoning_steps: bool
) -> dict[int, EncodedSample]:
    """Position → conversation; the steps of its reasoning are counted through all turns."""
    texts = [row.rendered.text for row in rows if row.rendered is not None]
    if len(texts) < len(rows):
        raise AssertionError("a conversation that no chat template has written (ready_rows)")
    end, samples = tokenizer.eos_token_id, {}
    for position, row, (ids, offsets) in zip(positions, rows, _with_places(texts, tokenizer), strict=True):
        assert row.rendered is not None
        begins = {begin for begin, _, _ in row.rendered.spans}
        if any(first < begin < last for first, last in offsets for begin in begins if begin < last):
            ids, offsets = _apart(row.rendered.text, sorted(begins), tokenizer)
        segments, steps = [int(Segment.PROMPT)] * len(ids), [0] * len(ids)
        for begin, stop, segment in row.rendered.spans:
            inside = [i for i, (first, _) in enumerate(offsets) if begin <= first < stop]
            for i in inside:
                segments[i] = segment
            if reasoning_steps and segment == Segment.RATIONALE:
                places = [(offsets[i][0] - begin, offsets[i][1] - begin) for i in inside]
                own = reasoning_step_ids(row.rendered.text[begin:stop], places)
                before = max(steps)
                for i, step in zip(inside, own, strict=True):
                    steps[i] = step and before + step
        if ids[-1] != end:  # what ends a turn need not end the text
            ids, segments, steps = [*ids, end], [*segments, int(Segment.ANSWER)], [*steps, 0]
        own_steps = tuple(steps) if reasoning_steps else ()
        samples[position] = EncodedSample(tuple(ids), tuple(segments), position, own_steps)
    return samples


Places = list[tuple[int, int]]


def _with_places(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], Places]]:
    """Token ids of rendered texts, and where in the text each stands."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _apart(text: str, begins: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Places]:
    """The tokens of a text of which one would straddle the begin of a segment, such as the line ends around it: a
    prompt has those that it has where nothing is said yet.
    """
    bounds = [0, *(begin for begin in begins if begin), len(text)]
    ids: list[int] = []
    places: Places = []
    parts = [text[begin:end] for begin, end in pairwise(bounds)]
    for begin, (own, offsets) in zip(bounds, _with_places(parts, tokenizer), strict=False):
        ids += own
        places += [(begin + first, begin + last) for first, last in offsets]
    return ids, places


def _with_teachers_text(
    samples: list[EncodedSample], examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedSample]:
    """Rows with what their teacher reads; those whose teacher reads too long a text are left out, too."""
    own = {i: e.teacher_rationale for i, e in enumerate(examples) if e.teacher_rationale is not None}
    texts = [replace(examples[i], rationale=text, teacher_rationale=None) for i, text in own.items()]
    places = list(own)
    encoded = encode_examples(texts, tokenizer, max_length, reasoning_steps=True).samples if texts else []
    teachers = {places[row.example]: replace(row, example=places[row.example]) for row in encoded}
    return [
        replace(row, teacher_text=teachers.get(row.example))
        for row in samples
        if row.example not in own or row.example in teachers
    ]
