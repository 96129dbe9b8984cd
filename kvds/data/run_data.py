"""A run's rows: loaded, encoded, counted, and cut into the same global batches on every number of ranks."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kvds.config import RunConfig
from kvds.data.batches import RowWidth
from kvds.data.encoding import EncodedCorpus, EncodedSample
from kvds.data.example import Example
from kvds.data.loader import BatchLoader
from kvds.data.mixture import Mixture, first_per_corpus, load_mixture
from kvds.data.on_policy_rows import check_prompts
from kvds.data.own_rows import Reading
from kvds.data.ready_rows import ReadyRows, ready_rows
from kvds.data.row_display import one_line_of
from kvds.data.text_fidelity import check_texts
from kvds.data.token_files import TokenFiles, encode_once
from kvds.errors import InputError
from kvds.identity.file_digest import cache_folder
from kvds.kv import selected_count

log = logging.getLogger("kvds")

# Tokens: what a GPU's matrix products and allocator have no rest of, and little beside a row of thousands.
_ROW_MULTIPLE = 64


@dataclass(frozen=True)
class RunData:
    """Batches to train on and rows to judge by.

    Attributes:
        loader: This rank's training micro-batches, by optimizer step.
        eval_examples: Held-out rows, at most ``eval_subset_size`` per corpus; empty when there is no evaluation.
        eval_loader: The same rows as batches in fixed order; None when there are none.
        rows: Corpus → rows to train on.
    """

    loader: BatchLoader
    eval_examples: list[Example]
    eval_loader: BatchLoader | None
    rows: Mapping[str, int]


@dataclass(frozen=True)
class EncodedRows:
    """Rows of a run as texts and as tokens.

    Attributes:
        examples: Rows to train on, as they are tokenised.
        samples: Those that fit.
        held_out_examples: Rows to judge by.
        held_out: Those that fit; empty when there is no evaluation.
    """

    examples: Sequence[Example]
    samples: Sequence[EncodedSample]
    held_out_examples: list[Example]
    held_out: Sequence[EncodedSample]


def encoded_rows(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, files: TokenFiles) -> EncodedRows:
    """Read, check and encode the rows that ``cfg`` names, and tell of them.

    Args:
        cfg: The run.
        tokenizer: Of the run.
        files: Where rows as tokens are kept.

    Raises:
        InputError: as :func:`load_run_data`.
    """
    held_out_rows = _held_out(cfg)
    mixture = _mixture(cfg, "train", held_out_rows)
    reasoning_steps = cfg.uses_kv and cfg.align_tokens == "segment"
    prepare = partial(
        ready_rows, tokenizer=tokenizer, max_length=cfg.max_length, assistant_turns=cfg.assistant_turns,
        on_bad_row=cfg.on_bad_row,
    )  # fmt: skip
    encode = partial(
        encode_once, tokenizer=tokenizer, max_length=cfg.max_length, reasoning_steps=reasoning_steps, files=files
    )
    texts = partial(check_texts, most=cfg.max_lossy_rows, tokenizer=tokenizer)
    rows = prepare(mixture.examples)
    corpus = encode(rows.examples)
    _report(cfg, mixture, rows, corpus)
    log.info("data: %s", one_line_of(corpus.samples[0], rows.examples, tokenizer))
    texts(corpus.fidelity, rows.examples, what="training")
    judged = first_per_corpus(held_out_rows, cfg.eval_subset_size) if cfg.eval_subset_size else []
    examples = prepare(judged).examples
    held_out: Sequence[EncodedSample] = []
    if examples:
        judged_by = encode(examples)
        texts(judged_by.fidelity, examples, what="held-out")
        held_out = judged_by.samples
    if reasoning_steps:
        _check_steps(cfg, corpus.samples)
    if cfg.on_policy_share:
        check_prompts(corpus.samples, rows.examples, cfg.on_policy_share)
    if examples and not held_out:
        raise InputError(
            f"max_length={cfg.max_length}: none of the {len(examples)} held-out rows fits; expected a larger "
            "--max_length (or --eval_subset_size 0: no evaluation)"
        )
    return EncodedRows(rows.examples, corpus.samples, examples, held_out)


def load_run_data(
    cfg: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rank: int,
    world_size: int,
    first: bool = True,
    wait: Callable[[], object] = lambda: None,
) -> RunData:
    """Load and encode what ``cfg`` names; rows that were encoded before are read from ``--data_cache``.

    Args:
        cfg: The run.
        tokenizer: Of the run.
        rank: This rank.
        world_size: Number of ranks.
        first: Whether this rank encodes what no file holds; the others read what the first of their node has written.
        wait: Returns when all ranks have called it.

    Raises:
        InputError: a malformed row (unless skipped), a missing corpus, or nothing usable left.
    """

    def batches(samples: Sequence[EncodedSample], *, accumulation: int, shuffle: bool) -> BatchLoader:
        pad = tokenizer.pad_token_id
        budget = (cfg.tokens_per_batch or 0) if shuffle else 0
        width = RowWidth(cfg.pad_to_multiple_of, cfg.max_length)
        if budget:
            width = RowWidth(max(cfg.pad_to_multiple_of, _ROW_MULTIPLE), budget)
        return BatchLoader(
            samples,
            batch_size=cfg.batch_size,
            gradient_accumulation_steps=accumulation,
            rank=rank,
            world_size=world_size,
            seed=cfg.seed,
            pad_token_id=tokenizer.eos_token_id if pad is None else pad,
            position_count=lambda length: selected_count(
                cfg.kv_method, cfg.kv_budget, length, mask_first_token=cfg.mask_first_token
            ),
            shuffle=shuffle,
            pack_to=cfg.max_length if cfg.packing and shuffle else None,
            group_by_length=cfg.group_by_length,
            width=width,
            tokens_per_batch=budget,
            longest=cfg.max_length if budget else 0,
            exchanged=cfg.uses_kv and cfg.teacher_kv == "shuffled",
        )

    rows = encoded_rows(cfg, tokenizer, TokenFiles(_folder(cfg), first, wait))
    held_out = rows.held_out
    return RunData(
        loader=batches(rows.samples, accumulation=cfg.gradient_accumulation_steps, shuffle=True),
        eval_examples=rows.held_out_examples,
        eval_loader=batches(held_out, accumulation=1, shuffle=False) if held_out else None,
        rows=Counter(rows.examples[sample.example].corpus for sample in rows.samples),
    )


def _folder(cfg: RunConfig) -> Path | None:
    if cfg.data_cache is None:
        return cache_folder()
    return None if cfg.data_cache == "never" else Path(cfg.data_cache)


def _check_steps(cfg: RunConfig, samples: Sequence[EncodedSample]) -> None:
    if not any(sample.reasoning_step_count for sample in samples):
        raise InputError(
            "align_tokens=segment: no training row has a rationale, so that there is no step to match; expected rows "
            "with reasoning (or --align_tokens position)"
        )
    if cfg.logit_kd_weight and any(sample.teacher_text is not None for sample in samples):
        raise InputError(
            f"logit_kd_weight={cfg.logit_kd_weight}: some rows have a teacher_rationale, and the logits of another "
            "text correspond to none of the student's; expected 0 (or rows without teacher_rationale)"
        )


def _held_out(cfg: RunConfig) -> list[Example]:
    """All rows to judge by, which are not trained on whether the run judges by them or somebody does later."""
    if cfg.streaming and not cfg.eval_subset_size:  # to look for them would read all of it
        return []
    try:
        return _mixture(cfg, "eval").examples
    except InputError as error:
        if cfg.eval_subset_size:
            raise
        log.warning("data: rows that ask what held-out ones ask are not left out of training: %s", error)
        return []


def _mixture(cfg: RunConfig, split: str, held_out: Sequence[Example] = ()) -> Mixture:
    return load_mixture(
        cfg.datasets,
        split,
        data_dir=cfg.data_dir,
        subset_size=cfg.subset_size if split == "train" else None,
        held_out=held_out,
        seed=cfg.seed,
        on_bad_row=cfg.on_bad_row,
        synthetic_problems=cfg.synthetic_problems,
        reading=Reading.of(cfg),
    )


def _report(cfg: RunConfig, mixture: Mixture, rows: ReadyRows, corpus: EncodedCorpus) -> None:
    log.info("data: %d rows to train on from %s", len(corpus.samples), " ".join(cfg.datasets))
    for name, count in mixture.counts.items():
        most = mixture.available[name]
        log.log(logging.WARNING if 2 * count < most else logging.INFO, "data: %s: %d of %d rows", name, count, most)
        if mixture.recognised.get(name):
            log.info("data: %s: read as %s", name, mixture.recognised[name])
        if mixture.held_out[name]:
            log.warning(
                "data: %s: %d of %d rows ask what a held-out row asks and were left out of training",
                name, mixture.held_out[name], most + mixture.held_out[name],
            )  # fmt: skip
    if corpus.too_long:
        log.warning(
            "data: %d rows are longer than --max_length %d tokens and were left out", corpus.too_long, cfg.max_length
        )
    if rows.cut:
        log.warning(
            "data: %d of %d texts are longer than --max_length %d tokens; of those the beginning is read", rows.cut,
            len(rows.examples), cfg.max_length,
        )  # fmt: skip
    for place, count in mixture.skipped.items():
        if count:
            log.warning("data: %d malformed rows of %s were skipped", count, place)
    for place, count in rows.skipped.items():
        log.warning("data: %d conversations of %s that the chat template cannot write were skipped", count, place)
    if not corpus.samples:
        raise InputError(
            f"--datasets {' '.join(cfg.datasets)}: no usable row is left ({corpus.too_long} longer than --max_length "
            f"{cfg.max_length}); expected at least one (raise --max_length or check the data)"
        )
