"""Token batches of encoded rows, padded or packed; every batch knows its global step's exact counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kvds.data.encoding import EncodedSample
from kvds.data.example import Segment
from kvds.data.labels import IGNORED_LABEL
from kvds.data.packing import Packing, pack_lengths, place_samples


@dataclass(frozen=True)
class RowWidth:
    """How long the rows of a batch are: the first multiple that holds the longest.

    Attributes:
        multiple: Tokens; 1 = as long as the longest.
        most: Tokens that no row needs to exceed (max_length); None = no such bound.
    """

    multiple: int = 1
    most: int | None = None

    def __call__(self, longest: int) -> int:
        """The tokens of a row where the longest has ``longest``."""
        width = -(-longest // self.multiple) * self.multiple
        return width if self.most is None else max(longest, min(width, self.most))


AS_LONGEST = RowWidth()


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
        reasoning_step_ids: ``[B, T]`` int64, the reasoning step of each token, counted from 1, 0 = none; None where
            positions are matched.
        num_reasoning_steps: Of the row that has the most, in either text.
        teacher_text: The same rows as the teacher reads them; None = these.
        packing: Where the samples lie; None = one in each row.
        row_samples: For each row its samples' positions among the loader's, in order; known without asking a device.
        pads_right: Padding is known to stand behind the samples alone, so that causal attention needs no mask.
        sampled_labels: ``[B, T]`` int64, as ``labels``: the tokens that the student wrote itself, which logit
            distillation counts and the task loss does not. None where no step has any.
        taught_normalizer: Of ``labels`` and ``sampled_labels`` together, as ``label_normalizer``, which is 0 where all
            of a step was written; None where no step has any.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    segment_ids: Tensor
    sample_ids: Tensor
    label_normalizer: float
    position_normalizer: float
    reasoning_step_ids: Tensor | None = None
    num_reasoning_steps: int = 0
    teacher_text: TokenBatch | None = None
    packing: Packing | None = None
    row_samples: tuple[tuple[int, ...], ...] = ()
    pads_right: bool = False
    sampled_labels: Tensor | None = None
    taught_normalizer: float | None = None

    def to(self, device: torch.device) -> TokenBatch:
        """The same with its tensors on ``device``."""
        step_ids, sampled = self.reasoning_step_ids, self.sampled_labels
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            segment_ids=self.segment_ids.to(device, non_blocking=True),
            sample_ids=self.sample_ids.to(device, non_blocking=True),
            reasoning_step_ids=None if step_ids is None else step_ids.to(device, non_blocking=True),
            teacher_text=None if self.teacher_text is None else self.teacher_text.to(device),
            packing=None if self.packing is None else self.packing.to(device),
            sampled_labels=None if sampled is None else sampled.to(device, non_blocking=True),
        )

    def pin_memory(self) -> TokenBatch:
        """The same in host memory that a GPU can copy from while it computes."""
        pinned: dict[str, Any] = {
            field.name: value.pin_memory()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | TokenBatch | Packing)
        }
        return replace(self, **pinned)


def collate(
    rows: Sequence[EncodedSample | None],
    sample_ids: Sequence[int],
    pad_token_id: int,
    label_normalizer: float,
    position_normalizer: float,
    *,
    width: RowWidth = AS_LONGEST,
    taught_normalizer: float | None = None,
) -> TokenBatch:
    """Pad rows to the ``width`` of the longest; None makes a row of padding, which counts nowhere.

    Args:
        rows: In order.
        sample_ids: Of the rows.
        pad_token_id: Fills up.
        label_normalizer: As of :class:`TokenBatch`.
        position_normalizer: As of :class:`TokenBatch`.
        width: How long rows are made for the longest.
        taught_normalizer: As of :class:`TokenBatch`; None: no row is the student's own.
    """
    tokens = width(max((len(row.input_ids) for row in rows if row is not None), default=1))
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
        row_samples=row_samples, pads_right=True,
    )  # fmt: skip
    if taught_normalizer is not None:
        written = torch.tensor([row is not None and row.sampled for row in rows]).unsqueeze(1)
        batch = _with_sampled_labels(batch, written, taught_normalizer)
    return _with_reasoning_steps(batch, rows, pad_token_id, width)


def _with_sampled_labels(batch: TokenBatch, written: Tensor, taught_normalizer: float) -> TokenBatch:
    """The batch with the labels where ``written``, which broadcasts to ``[B, T]``, apart from the others."""
    return replace(
        batch, labels=batch.labels.masked_fill(written, IGNORED_LABEL),
        sampled_labels=batch.labels.masked_fill(~written, IGNORED_LABEL), taught_normalizer=taught_normalizer,
    )  # fmt: skip


def _with_reasoning_steps(
    batch: TokenBatch, rows: Sequence[EncodedSample | None], pad_token_id: int, width: RowWidth
) -> TokenBatch:
    """The batch with the steps of its rows and with what their teacher reads, where they have either."""
    if not any(row is not None and row.reasoning_step_ids for row in rows):
        return batch
    reasoning_step_ids = torch.zeros_like(batch.segment_ids)
    for position, row in enumerate(rows):
        if row is not None:
            reasoning_step_ids[position, : len(row.reasoning_step_ids)] = torch.tensor(row.reasoning_step_ids)
    text = None
    if any(row is not None and row.teacher_text is not None for row in rows):
        read = [row if row is None or row.teacher_text is None else row.teacher_text for row in rows]
        text = collate(
            read, batch.sample_ids.tolist(), pad_token_id, batch.label_normalizer, batch.position_normalizer,
            width=width,
        )  # fmt: skip
    num_reasoning_steps = max(1, int(reasoning_step_ids.max()), 0 if text is None else text.num_reasoning_steps)
    if text is not None:
        text = replace(text, num_reasoning_steps=num_reasoning_steps)
    return replace(
        batch, reasoning_step_ids=reasoning_step_ids, num_reasoning_steps=num_reasoning_steps, teacher_text=text
    )


def collate_packed(
    rows: Sequence[EncodedSample | None],
    sample_ids: Sequence[int],
    pad_token_id: int,
    label_normalizer: float,
    position_normalizer: float,
    *,
    capacity: int,
    width: RowWidth = AS_LONGEST,
    one_row: bool = False,
    longest: int | None = None,
    taught_normalizer: float | None = None,
) -> TokenBatch:
    """As :func:`collate`, with samples sharing rows of at most ``capacity`` tokens; None takes no place at all.

    Args:
        rows: As for :func:`collate`.
        sample_ids: As for :func:`collate`.
        pad_token_id: As for :func:`collate`.
        label_normalizer: As for :func:`collate`.
        position_normalizer: As for :func:`collate`.
        capacity: Tokens of a row.
        width: How long rows are made for the longest.
        one_row: All samples in one row, which must hold them.
        longest: No sample of the run has more tokens; None: ``capacity``.
        taught_normalizer: As for :func:`collate`.
    """
    samples = [row for row in rows if row is not None]
    lengths = [len(row.input_ids) for row in samples]
    dealt = [list(range(len(samples)))] if one_row else pack_lengths(lengths, capacity)
    packing, places = place_samples(dealt, lengths, width, longest=capacity if longest is None else longest)
    input_ids = torch.full(packing.document_ids.shape, pad_token_id)
    segment_ids = torch.zeros_like(input_ids)
    first, written = (torch.zeros_like(input_ids, dtype=torch.bool) for _ in range(2))
    for row, (number, begin) in zip(samples, places, strict=True):
        end = begin + len(row.input_ids)
        input_ids[number, begin:end] = torch.tensor(row.input_ids)
        segment_ids[number, begin:end] = torch.tensor(row.segment_ids)
        first[number, begin] = True
        written[number, begin:end] = row.sampled
    # Nothing predicts the first token of a sample, least of all the sample before it.
    labels = torch.where((segment_ids >= Segment.RATIONALE) & ~first, input_ids, IGNORED_LABEL)
    mask = (packing.document_ids >= 0).long()
    numbers = [i for row, i in zip(rows, sample_ids, strict=True) if row is not None]
    batch = TokenBatch(
        input_ids, mask, labels, segment_ids, torch.tensor(numbers or [-1]), label_normalizer, position_normalizer,
        packing=packing, row_samples=tuple(tuple(numbers[i] for i in row) for row in dealt),
    )  # fmt: skip
    return batch if taught_normalizer is None else _with_sampled_labels(batch, written, taught_normalizer)
