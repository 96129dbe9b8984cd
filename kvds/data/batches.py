"""From rows to token batches: every token knows its segment, every global step its exact counts.

A row is ``prompt⏎ rationale⏎ #### answer<end>``. Its segments are tokenised one by one and joined, so that no token
straddles two, and a generated completion starts from exactly the ids that training puts before it. A begin-of-text
token stands in front, as part of the prompt, where the tokenizer itself puts one.

The samples of optimizer step n are a pure function of seed and n: the same on any number of ranks, and resuming is
asking for a later n.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvds.data.example import Example, answer_text, prompt_text, rationale_text
from kvds.data.grouping import group_by_length
from kvds.data.packing import Packing, pack_lengths, place_samples
from kvds.data.steps import encode_steps
from kvds.errors import InputError
from kvds.losses import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Segment(IntEnum):
    """What a token belongs to."""

    PAD = 0
    PROMPT = 1
    RATIONALE = 2
    ANSWER = 3


@dataclass(frozen=True)
class EncodedSample:
    """One row as tokens.

    Attributes:
        input_ids: Token ids.
        segment_ids: Their :class:`Segment`, as many.
        example: Position of the row in the list that was encoded.
        step_ids: The reasoning step of each token, counted from 1, 0 = none; empty where steps were not asked for.
        teacher: The row as the teacher reads it; None = the same text.
    """

    input_ids: tuple[int, ...]
    segment_ids: tuple[int, ...]
    example: int
    step_ids: tuple[int, ...] = ()
    teacher: EncodedSample | None = None

    @property
    def step_count(self) -> int:
        """Steps that both texts have."""
        own = max(self.step_ids, default=0)
        return own if self.teacher is None else min(own, self.teacher.step_count)

    @property
    def label_count(self) -> int:
        """Tokens that the task loss counts: rationale and answer, never the first of a row (nothing predicts it)."""
        return sum(segment >= Segment.RATIONALE for segment in self.segment_ids[1:])


@dataclass(frozen=True)
class EncodedCorpus:
    """Rows as tokens, without those over the length.

    Attributes:
        samples: The rows that fit.
        too_long: How many did not.
    """

    samples: list[EncodedSample]
    too_long: int


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


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, *, steps: bool = False
) -> EncodedCorpus:
    """Tokenise ``prompt⏎ | rationale⏎ | #### answer<end>``, all rows at once.

    Args:
        examples: Rows.
        tokenizer: With an end-of-text token.
        max_length: Tokens; rows with more are left out and counted, never cut (a cut row would teach a wrong answer).
        steps: Also number the reasoning steps, and encode the teacher's own text where a row has one.

    Raises:
        InputError: the tokenizer has no end-of-text token, so that no answer could end; or cannot number steps.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path}: has no end-of-text token; expected an eos_token, which ends each "
            "answer (name another with --tokenizer_name)"
        )
    texts = [rationale_text(example) for example in examples]
    prompts = prompt_ids(examples, tokenizer)
    rationales, numbers = encode_steps(texts, tokenizer) if steps else (_segments(texts, tokenizer), None)
    answers = _segments([answer_text(example) for example in examples], tokenizer)
    samples = []
    for position, (prompt, rationale, answer) in enumerate(zip(prompts, rationales, answers, strict=True)):
        ids = (*prompt, *rationale, *answer, end)
        if len(ids) <= max_length:
            lengths = (
                (Segment.PROMPT, len(prompt)),
                (Segment.RATIONALE, len(rationale)),
                (Segment.ANSWER, len(answer) + 1),
            )
            segments = tuple(int(segment) for segment, length in lengths for _ in range(length))
            own = () if numbers is None else ((0,) * len(prompt) + numbers[position] + (0,) * (len(answer) + 1))
            samples.append(EncodedSample(ids, segments, position, own))
    if steps:
        samples = _with_teachers_text(samples, examples, tokenizer, max_length)
    return EncodedCorpus(samples, len(examples) - len(samples))


def _with_teachers_text(
    samples: list[EncodedSample], examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedSample]:
    """Rows with what their teacher reads; those whose teacher reads too long a text are left out, too."""
    own = {i: e.teacher_rationale for i, e in enumerate(examples) if e.teacher_rationale is not None}
    texts = [replace(examples[i], rationale=text, teacher_rationale=None) for i, text in own.items()]
    places = list(own)
    encoded = encode_examples(texts, tokenizer, max_length, steps=True).samples if texts else []
    teachers = {places[row.example]: replace(row, example=places[row.example]) for row in encoded}
    return [
        replace(row, teacher=teachers.get(row.example))
        for row in samples
        if row.example not in own or row.example in teachers
    ]


@dataclass
class TokenBatch:
    """A micro-batch, padded on the right; a row holds one sample, or several where ``packing`` says which.

    Attributes:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64, 1 = real token.
        labels: ``[B, T]`` int64, unshifted, -100 where not counted: rationale, answer and end token count.
        segment_ids: ``[B, T]`` int64, see :class:`Segment`.
        sample_ids: ``[B]`` int64 (``[N]`` samples where packed), positions among the loader's; -1 = padding alone.
        label_normalizer: Tokens that the task loss counts in the whole global step, per rank and micro-batch.
        position_normalizer: Positions (or steps) whose keys and values count in the whole global step, per rank and
            micro-batch.
        step_ids: ``[B, T]`` int64, the reasoning step of each token, counted from 1, 0 = none; None where positions
            are matched.
        num_steps: Steps of the row that has the most, in either text.
        teacher_text: The same rows as the teacher reads them; None = these.
        packing: Where the samples lie; None = one in each row.
        row_samples: For each row its samples' positions among the loader's, in order; known without asking a device.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    segment_ids: Tensor
    sample_ids: Tensor
    label_normalizer: float
    position_normalizer: float
    step_ids: Tensor | None = None
    num_steps: int = 0
    teacher_text: TokenBatch | None = None
    packing: Packing | None = None
    row_samples: tuple[tuple[int, ...], ...] = ()

    def to(self, device: torch.device) -> TokenBatch:
        """The same with its tensors on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            segment_ids=self.segment_ids.to(device, non_blocking=True),
            sample_ids=self.sample_ids.to(device, non_blocking=True),
            step_ids=None if self.step_ids is None else self.step_ids.to(device, non_blocking=True),
            teacher_text=None if self.teacher_text is None else self.teacher_text.to(device),
            packing=None if self.packing is None else self.packing.to(device),
        )


def collate(
    rows: Sequence[EncodedSample | None],
    sample_ids: Sequence[int],
    pad_token_id: int,
    label_normalizer: float,
    position_normalizer: float,
) -> TokenBatch:
    """Pad rows to the longest; None makes a row of padding, which counts nowhere."""
    tokens = max((len(row.input_ids) for row in rows if row is not None), default=1)
    shape = (len(rows), tokens)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask, segment_ids = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    # An attention row without any key gives NaN: an empty row keeps one token to look at.
    attention_mask[:, 0] = 1
    for position, row in enumerate(rows):
        if row is not None:
            length = len(row.input_ids)
            input_ids[position, :length] = torch.tensor(row.input_ids)
            segment_ids[position, :length] = torch.tensor(row.segment_ids)
            attention_mask[position, :length] = 1
    labels = torch.where(segment_ids >= Segment.RATIONALE, input_ids, IGNORED_LABEL)
    ids = torch.tensor(list(sample_ids))
    row_samples = tuple(() if row is None else (i,) for row, i in zip(rows, sample_ids, strict=True))
    batch = TokenBatch(
        input_ids, attention_mask, labels, segment_ids, ids, label_normalizer, position_normalizer,
        row_samples=row_samples,
    )  # fmt: skip
    return _with_steps(batch, rows, pad_token_id)


def _with_steps(batch: TokenBatch, rows: Sequence[EncodedSample | None], pad_token_id: int) -> TokenBatch:
    """The batch with the steps of its rows and with what their teacher reads, where they have either."""
    if not any(row is not None and row.step_ids for row in rows):
        return batch
    step_ids = torch.zeros_like(batch.segment_ids)
    for position, row in enumerate(rows):
        if row is not None:
            step_ids[position, : len(row.step_ids)] = torch.tensor(row.step_ids)
    text = None
    if any(row is not None and row.teacher is not None for row in rows):
        read = [row if row is None or row.teacher is None else row.teacher for row in rows]
        text = collate(read, batch.sample_ids.tolist(), pad_token_id, batch.label_normalizer, batch.position_normalizer)
    num_steps = max(1, int(step_ids.max()), 0 if text is None else text.num_steps)
    if text is not None:
        text = replace(text, num_steps=num_steps)
    return replace(batch, step_ids=step_ids, num_steps=num_steps, teacher_text=text)


def collate_packed(
    rows: Sequence[EncodedSample | None],
    sample_ids: Sequence[int],
    pad_token_id: int,
    label_normalizer: float,
    position_normalizer: float,
    *,
    capacity: int,
) -> TokenBatch:
    """As :func:`collate`, with samples sharing rows of at most ``capacity`` tokens; None takes no place at all."""
    samples = [row for row in rows if row is not None]
    lengths = [len(row.input_ids) for row in samples]
    dealt = pack_lengths(lengths, capacity)
    packing, places = place_samples(dealt, lengths)
    input_ids = torch.full(packing.document_ids.shape, pad_token_id)
    segment_ids = torch.zeros_like(input_ids)
    first = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (number, begin) in zip(samples, places, strict=True):
        end = begin + len(row.input_ids)
        input_ids[number, begin:end] = torch.tensor(row.input_ids)
        segment_ids[number, begin:end] = torch.tensor(row.segment_ids)
        first[number, begin] = True
    # Nothing predicts the first token of a sample, least of all the sample before it.
    labels = torch.where((segment_ids >= Segment.RATIONALE) & ~first, input_ids, IGNORED_LABEL)
    mask = (packing.document_ids >= 0).long()
    numbers = [i for row, i in zip(rows, sample_ids, strict=True) if row is not None]
    return TokenBatch(
        input_ids, mask, labels, segment_ids, torch.tensor(numbers or [-1]), label_normalizer, position_normalizer,
        packing=packing, row_samples=tuple(tuple(numbers[i] for i in row) for row in dealt),
    )  # fmt: skip


class BatchLoader:
    """This rank's micro-batches of each optimizer step.

    A global step takes the next ``batch_size · gradient_accumulation_steps · world_size`` samples of its epoch's order
    and deals them out. The last step of an epoch is filled with rows of padding, so that all ranks run equally many
    forwards.

    Args:
        samples: All encoded rows.
        batch_size: Rows per rank and micro-batch.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        rank: This rank.
        world_size: Number of ranks.
        seed: Of the order, which differs from epoch to epoch.
        pad_token_id: Fills up rows.
        position_count: Real length of a row → positions whose keys and values count; rows with steps count those.
        shuffle: False keeps the order of ``samples``.
        pack_to: Tokens of a row that the samples of a micro-batch share; None = a row each.
        group_by_length: Shuffle so that the samples of a step are of like length.

    Raises:
        InputError: there are no samples.
    """

    def __init__(
        self,
        samples: Sequence[EncodedSample],
        *,
        batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
        pad_token_id: int,
        position_count: Callable[[int], int],
        shuffle: bool = True,
        pack_to: int | None = None,
        group_by_length: bool = False,
    ) -> None:
        if not samples:
            raise InputError(
                "no row is left to make batches of; expected at least one (raise --max_length or check the data)"
            )
        self._samples, self._batch_size, self._accumulation = samples, batch_size, gradient_accumulation_steps
        self._rank, self._world_size = rank, world_size
        self._seed, self._shuffle, self._pad = seed, shuffle, pad_token_id
        self._pack_to, self._group_by_length = pack_to, group_by_length
        self._labels = [sample.label_count for sample in samples]
        self._positions = [
            sample.step_count if sample.step_ids else position_count(len(sample.input_ids)) for sample in samples
        ]
        self._global_batch = batch_size * gradient_accumulation_steps * world_size
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def samples(self) -> Sequence[EncodedSample]:
        """All rows, in the numbering of ``sample_ids``."""
        return self._samples

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the samples."""
        return -(-len(self._samples) // self._global_batch)

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(len(self._samples)))
            if self._shuffle:
                draw = random.Random(self._seed * 1_000_003 + epoch)
                draw.shuffle(order)
                if self._group_by_length:
                    lengths = [len(sample.input_ids) for sample in self._samples]
                    order = group_by_length(order, lengths, self._global_batch, draw)
            self._order = (epoch, order)
        return self._order[1]

    def sample_ids(self, step: int) -> list[int]:
        """The samples of global step ``step``, over all ranks, in order; -1 fills up the last of an epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        ids = self._epoch_order(epoch)[position * self._global_batch : (position + 1) * self._global_batch]
        return ids + [-1] * (self._global_batch - len(ids))

    def step(self, step: int) -> list[TokenBatch]:
        """The micro-batches of 0-based optimizer step ``step``, on the CPU."""
        ids = self.sample_ids(step)
        shares = self._world_size * self._accumulation
        real = [i for i in ids if i >= 0]
        # At least one token, so that a step of rows without any divides by no zero.
        labels = max(1, sum(self._labels[i] for i in real)) / shares
        positions = max(1, sum(self._positions[i] for i in real)) / shares
        batches = []
        for micro in range(self._accumulation):
            begin = (micro * self._world_size + self._rank) * self._batch_size
            mine = ids[begin : begin + self._batch_size]
            rows = [self._samples[i] if i >= 0 else None for i in mine]
            if self._pack_to is None:
                batches.append(collate(rows, mine, self._pad, labels, positions))
            else:
                packed = collate_packed(rows, mine, self._pad, labels, positions, capacity=self._pack_to)
                batches.append(packed)
        return batches
