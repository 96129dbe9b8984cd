"""Rows of a run and how long they are: read where tokenizer and data lie here, assumed where not."""

from __future__ import annotations

from dataclasses import dataclass

from kvds.config import RunConfig
from kvds.data.encoding import prompt_length
from kvds.data.loader import BatchLoader
from kvds.errors import InputError
from kvds.handoff.continuation import Continuation
from kvds.kv.select import row_budget
from kvds.plan.batch_shape import BatchShape


@dataclass(frozen=True)
class RowPlan:
    """The batches of an epoch.

    Attributes:
        largest: The largest micro-batch of a rank.
        row_labelled: The most labelled tokens of one row.
        steps: Optimizer steps of an epoch; None where nobody knows.
        padded_tokens: Tokens that the rank of the longest rows computes in an epoch, padding included, times the ranks,
            which wait for it; None likewise.
        labelled_tokens: Those that the head runs on; None likewise.
        handed_tokens: Slots of the caches that answers are written from, padding included; None likewise.
        followed_tokens: Of the forwards over them; None likewise.
        note: Where the numbers come from.
    """

    largest: BatchShape
    row_labelled: int
    steps: int | None
    padded_tokens: int | None
    labelled_tokens: int | None
    note: str
    handed_tokens: int | None = 0
    followed_tokens: int | None = 0


def plan_rows(cfg: RunConfig, ranks: int, assumed: int | None = None) -> RowPlan:
    """Lengths from the data itself; without it every row is taken to be ``max_length`` long.

    Args:
        cfg: The run.
        ranks: In all.
        assumed: Training rows to assume where the data cannot be read here.
    """
    from kvds.data.run_data import load_run_data
    from kvds.models.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(cfg)
        loader = load_run_data(cfg, tokenizer, rank=0, world_size=ranks).loader
    except InputError as error:
        return _assumed(cfg, ranks, assumed, str(error))
    return measured_rows(cfg, loader, ranks)


def measured_rows(cfg: RunConfig, loader: BatchLoader, ranks: int) -> RowPlan:
    """The batches that a rank's loader gives in an epoch."""
    rows = tokens = labelled = row_labelled = padded = labels = shared = longest = 0
    handed = follow = all_handed = all_followed = 0
    for step in range(loader.steps_per_epoch):
        for batch in loader.step(step):
            padded += batch.input_ids.numel()
            if batch.input_ids.numel() > rows * tokens:
                rows, tokens = batch.input_ids.shape
            counts = (batch.labels[:, 1:] >= 0).sum(1)
            here, row_labelled = int(counts.sum()), max(row_labelled, int(counts.max()))
            labelled, labels = max(labelled, here), labels + here
            if cfg.handoff_weight:
                place = Continuation.from_batch(batch)
                handed, follow = max(handed, place.prompt_index.shape[1]), max(follow, place.index.shape[1])
                all_handed, all_followed = all_handed + place.prompt_index.numel(), all_followed + place.index.numel()
            packing = batch.packing
            shared = max(shared, 1 if packing is None else packing.samples_per_row)
            longest = max(longest, batch.input_ids.shape[1] if packing is None else packing.token_index.shape[1])
    samples = shared if cfg.tokens_per_batch else cfg.batch_size
    if cfg.on_policy_share:  # a completion may be as long as there is room for
        new = cfg.on_policy_max_new_tokens
        longest = max(longest, *(min(cfg.max_length, prompt_length(row) + new) for row in loader.samples))
        tokens = max(tokens, cfg.tokens_per_batch or (cfg.max_length if cfg.packing else longest))
        labelled = max(labelled, min(rows * tokens, samples * min(new, longest - 1)))
    slots = min(tokens, shared * row_budget(cfg.kv_budget, longest)) if cfg.uses_kv else tokens
    largest = BatchShape(rows, tokens, labelled, slots, samples, handed, follow)
    note = f"longest row {tokens} tokens, read from the data"
    if cfg.tokens_per_batch:
        note = f"up to {shared} samples of up to {longest} tokens in one row, read from the data"
    elif cfg.packing:
        note = f"{cfg.batch_size} samples of up to {longest} tokens packed, read from the data"
    if cfg.on_policy_share:
        note += " and the longest completions"
    epoch = padded * ranks, labels * ranks, note, all_handed * ranks, all_followed * ranks
    return RowPlan(largest, row_labelled, loader.steps_per_epoch, *epoch)


def _assumed(cfg: RunConfig, ranks: int, rows: int | None, reason: str) -> RowPlan:
    length = cfg.max_length
    slots = length
    if isinstance(cfg.kv_budget, int) and cfg.uses_kv:
        slots = min(length, cfg.kv_budget)
    elif isinstance(cfg.kv_budget, float) and cfg.uses_kv:
        slots = max(1, round(cfg.kv_budget * length))
    # Of a row that is all answer the whole is written over a cache of one slot, which is masked.
    handoff = (1, length) if cfg.handoff_weight else (0, 0)
    largest = BatchShape(cfg.batch_size, length, cfg.batch_size * (length - 1), slots, cfg.batch_size, *handoff)
    if tokens := cfg.tokens_per_batch:
        samples = tokens // length
        largest = BatchShape(1, tokens, samples * (length - 1), min(tokens, samples * slots), samples)
    note = f"every row taken as --max_length {length} tokens: the data cannot be read here ({reason[:160]})"
    if rows is None:
        return RowPlan(largest, length - 1, None, None, None, note, None, None)
    steps = -(-rows // (cfg.batch_size * cfg.gradient_accumulation_steps * ranks))
    padded = steps * cfg.batch_size * cfg.gradient_accumulation_steps * ranks * length
    followed = (padded // length, padded) if cfg.handoff_weight else (0, 0)
    return RowPlan(largest, length - 1, steps, padded, padded, note, *followed)
