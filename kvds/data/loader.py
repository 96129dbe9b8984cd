"""Batch loader: which samples make up which step, on which rank.

The samples of optimizer step n are a pure function of seed and n: the same on any number of ranks, and resuming is
asking for a later n.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from kvds.data.batches import AS_LONGEST, RowWidth, TokenBatch, collate, collate_packed
from kvds.data.encoding import EncodedSample
from kvds.data.grouping import deal_by_length, deal_to_rows, group_by_length
from kvds.data.read_ahead import ReadAhead
from kvds.errors import InputError


class BatchLoader:
    """This rank's micro-batches of each optimizer step.

    A global step takes the next ``batch_size · gradient_accumulation_steps · world_size`` samples of its epoch's order
    and deals them out by their length (:func:`kvds.data.grouping.deal_by_length`). The last step of an epoch is filled
    with rows of padding, so that all ranks run equally many forwards. With ``tokens_per_batch`` the same samples make
    as few micro-batches as their tokens allow, of one row each; their number may differ from step to step.

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
        width: How long rows are made for the longest sample of a batch.
        tokens_per_batch: Tokens of the one row that a micro-batch is; 0 = micro-batches of ``batch_size`` samples.
        longest: No sample has more tokens; 0: as many as the longest of ``samples``.
        exchanged: Rows take the keys and values of others of their micro-batch: those of one alone count nowhere.

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
        width: RowWidth = AS_LONGEST,
        tokens_per_batch: int = 0,
        longest: int = 0,
        exchanged: bool = False,
    ) -> None:
        if not samples:
            raise InputError(
                "no row is left to make batches of; expected at least one (raise --max_length or check the data)"
            )
        self._samples, self._batch_size, self._accumulation = samples, batch_size, gradient_accumulation_steps
        self._rank, self._world_size = rank, world_size
        self._seed, self._shuffle, self._pad = seed, shuffle, pad_token_id
        self._pack_to, self._group_by_length, self._width = pack_to, group_by_length, width
        self._lengths = [len(sample.input_ids) for sample in samples]
        self._tokens_per_batch, self._longest = tokens_per_batch, longest or max(self._lengths)
        self._exchanged = exchanged
        self._labels = [sample.label_count for sample in samples]
        self._positions = [
            sample.reasoning_step_count if sample.reasoning_step_ids else position_count(len(sample.input_ids))
            for sample in samples
        ]
        self._position_count = position_count
        self._global_batch = batch_size * gradient_accumulation_steps * world_size
        self._order: tuple[int, list[int]] = (-1, [])
        self._ahead: ReadAhead[list[TokenBatch]] | None = None

    @property
    def samples(self) -> Sequence[EncodedSample]:
        """All rows, in the numbering of ``sample_ids``."""
        return self._samples

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the samples."""
        return -(-len(self._samples) // self._global_batch)

    def _epoch_order(self, epoch: int) -> list[int]:
        known, order = self._order
        if known != epoch:
            order = list(range(len(self._samples)))
            if self._shuffle:
                draw = random.Random(self._seed * 1_000_003 + epoch)
                draw.shuffle(order)
                if self._group_by_length:
                    order = group_by_length(order, self._lengths, self._global_batch, draw)
            self._order = (epoch, order)
        return order

    def sample_ids(self, step: int) -> list[int]:
        """The samples of global step ``step``, over all ranks; -1 fills up the last of an epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        ids = self._epoch_order(epoch)[position * self._global_batch : (position + 1) * self._global_batch]
        return ids + [-1] * (self._global_batch - len(ids))

    @contextlib.contextmanager
    def read_ahead(
        self, steps: range, finish: Callable[[list[TokenBatch]], list[TokenBatch]] = lambda batches: batches
    ) -> Iterator[None]:
        """Within it, a thread builds the batches of ``steps`` before :meth:`step` is asked for them, in that order.

        Args:
            steps: Optimizer steps, counted from 0.
            finish: What else the thread does with a step's batches.
        """
        with ReadAhead(lambda step: finish(self._build(step)), steps) as self._ahead:
            try:
                yield
            finally:
                self._ahead = None

    def step(self, step: int) -> list[TokenBatch]:
        """The micro-batches of 0-based optimizer step ``step``, on the CPU: those built ahead where they are."""
        return self._build(step) if self._ahead is None else self._ahead.take(step)

    def out_of_turn(self, step: int) -> list[TokenBatch]:
        """As :meth:`step`, of any step at any time, and never one built ahead."""
        return self._build(step)

    def samples_before(self, step: int) -> int:
        """Samples of all steps before ``step``, over all ranks."""
        epochs, position = divmod(step, self.steps_per_epoch)
        return epochs * len(self._samples) + position * self._global_batch

    def step_with(self, step: int, written: Mapping[int, EncodedSample]) -> list[TokenBatch]:
        """As :meth:`out_of_turn`, with rows that the student wrote in place of others, dealt out by what they hold.

        Args:
            step: Optimizer step.
            written: The number of a sample of this step → the row in its place; the same on every rank.
        """
        return self._build(step, written)

    def _build(self, step: int, written: Mapping[int, EncodedSample] | None = None) -> list[TokenBatch]:
        ids = self.sample_ids(step)
        real = [i for i in ids if i >= 0]
        given = written or {}

        def row_of(i: int) -> EncodedSample:
            return given[i] if i in given else self._samples[i]

        lengths = {i: len(given[i].input_ids) if i in given else self._lengths[i] for i in real}
        dealt: list[list[int]] = []
        if self._tokens_per_batch:
            dealt = deal_to_rows(ids, lengths, self._tokens_per_batch, self._world_size)
        shares = len(dealt) or self._world_size * self._accumulation
        # At least one token, so that a step of rows without any divides by no zero.
        counted_labels = sum(given[i].label_count if i in given else self._labels[i] for i in real)
        labels, taught = max(1, counted_labels) / shares, None
        if written is not None:
            labels = counted_labels / shares  # 0 tells that there is no task loss
            taught = max(1, counted_labels + sum(row.taught_count for row in written.values())) / shares
        if self._shuffle and shares > 1 and not dealt:
            ids = deal_by_length(ids, lengths, self._batch_size, packed=self._pack_to is not None)
        counted = [i for i in ids if i >= 0]
        if self._exchanged:
            micros = [ids[begin : begin + self._batch_size] for begin in range(0, len(ids), self._batch_size)]
            counted = [i for micro in micros for i in micro if i >= 0 and sum(other >= 0 for other in micro) > 1]
        compared = sum(self._position_count(lengths[i]) if i in given else self._positions[i] for i in counted)
        positions = max(1, compared) / shares
        if dealt:
            return [
                collate_packed(
                    [row_of(i) for i in row], row, self._pad, labels, positions, capacity=self._tokens_per_batch,
                    width=self._width, one_row=True, longest=self._longest, taught_normalizer=taught,
                )
                for row in dealt[self._rank :: self._world_size]
            ]  # fmt: skip
        batches = []
        for micro in range(self._accumulation):
            begin = (micro * self._world_size + self._rank) * self._batch_size
            mine = ids[begin : begin + self._batch_size]
            rows = [row_of(i) if i >= 0 else None for i in mine]
            if self._pack_to is None:
                batches.append(
                    collate(rows, mine, self._pad, labels, positions, width=self._width, taught_normalizer=taught)
                )
            else:
                packed = collate_packed(
                    rows, mine, self._pad, labels, positions, capacity=self._pack_to, width=self._width,
                    taught_normalizer=taught,
                )  # fmt: skip
                batches.append(packed)
        return batches
