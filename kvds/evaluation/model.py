"""How good a model is on held-out rows: cross entropy of the completion, and exact match of the generated answer."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from kvds.data.batches import collate
from kvds.data.encoding import EncodedSample, Segment, encode_examples
from kvds.data.example import Example, answer_text, extract_answer
from kvds.data.labels import LabelledPositions
from kvds.durable_files import json_text
from kvds.kv.families import backbone

log = logging.getLogger("kvds")

# Logits of one chunk: at most this many elements (512 MiB in fp32).
_CHUNK_ELEMENTS = 2**27


def evaluate_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
    max_length: int,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: Callable[[Tensor], None] | None = None,
    progress: bool = True,
    predictions_path: str | Path | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Judge ``model`` on ``examples``, per corpus and over all.

    ``cross_entropy`` is the mean over the tokens of rationale and answer, ``perplexity`` its exponential,
    ``exact_match`` the share of rows whose greedily generated completion holds the right answer. Rows are sorted by
    length into batches with little padding; positions follow the attention mask, so that the batch size decides about
    speed and nothing else.
    Neither random states nor the model's modes are changed.

    Args:
        model: A whole causal language model on this rank (not sharded: ranks generate different rows).
        tokenizer: Its tokenizer.
        examples: Rows, the same on every rank; this rank judges its share.
        batch_size: Rows per forward.
        max_new_tokens: Tokens generated at most; less where the longest prompt leaves the model fewer positions.
        max_length: Rows with more tokens are left out.
        rank: This rank.
        world_size: Number of ranks.
        all_reduce: Sums a tensor over all ranks in place; None: the shares are not put together.
        progress: Show a bar (on rank 0).
        predictions_path: Also write a JSON line per row: completion, predicted and expected answer, cross entropy. With
            several ranks each writes its own share, ``NAME-rank1.jsonl`` and so on.
        between_batches: Called before each batch, equally often on all ranks, whatever their shares.

    Returns:
        Corpus (and ``"all"``) → ``cross_entropy`` (nats per token), ``perplexity``, ``exact_match`` (0 to 1) and
        ``samples`` (rows). Where no row was short enough, ``samples`` is 0 and the others
        are NaN.
    """
    samples = encode_examples(examples, tokenizer, max_length).samples
    left_out = len(examples) - len(samples)
    if left_out and rank == 0:
        log.warning(
            "evaluation: %d rows are longer than --max_length %d tokens and were left out", left_out, max_length
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    budget = _generation_budget(model, samples, max_new_tokens)
    # Neighbours in length go to different ranks: all are done at about the same time. The longest come first, so that
    # memory that does not suffice is noticed at once.
    share = sorted(samples, key=lambda sample: -len(sample.input_ids))[rank::world_size]
    largest_share = -(-len(samples) // world_size)
    losses: dict[int, tuple[float, int]] = {}
    completions: dict[int, str] = {}
    bar = tqdm(total=2 * len(share), desc="evaluate", unit="row", disable=not progress or rank != 0, mininterval=0.5)
    with torch.no_grad(), _evaluation_mode(model), bar:
        for rows in _batches(share, batch_size, largest_share, between_batches):
            for row, loss in zip(rows, completion_losses(model, rows, pad), strict=True):
                losses[row.example] = (loss, row.label_count)
            bar.update(len(rows))
        share = sorted(share, key=lambda sample: -_prompt_length(sample))
        with _greedy_defaults(model, tokenizer, pad, budget):
            for rows in _batches(share, batch_size, largest_share, between_batches):
                for row, text in zip(rows, _generate(model, tokenizer, rows, pad), strict=True):
                    completions[row.example] = text
                bar.update(len(rows))

    correct = {i: extract_answer(text) == _expected_answer(examples[i]) for i, text in completions.items()}
    if predictions_path is not None:
        _write_predictions(_of_rank(Path(predictions_path), rank, world_size), examples, losses, completions, correct)
    corpora = sorted({examples[sample.example].corpus for sample in samples})
    # Per corpus: Σ loss, tokens, right answers, rows; fp64, so that the sum over ranks is the mean of one process.
    sums = torch.zeros(len(corpora), 4, dtype=torch.float64)
    for i, (loss, tokens) in losses.items():
        sums[corpora.index(examples[i].corpus)] += torch.tensor([loss, tokens, correct[i], 1], dtype=torch.float64)
    if all_reduce is not None and corpora:
        sums = sums.to(next(model.parameters()).device)
        all_reduce(sums)
    rows_of = dict(zip(corpora, sums.tolist(), strict=True))
    rows_of["all"] = sums.sum(0).tolist()
    return {corpus: _summary(*values) for corpus, values in rows_of.items()}


def _summary(loss: float, tokens: float, right: float, rows: float) -> dict[str, float]:
    cross_entropy = loss / tokens if tokens else math.nan
    return {
        "cross_entropy": cross_entropy,
        "perplexity": math.exp(cross_entropy) if not cross_entropy > 700 else math.inf,
        "exact_match": right / rows if rows else math.nan,
        "samples": int(rows),
    }


def _expected_answer(example: Example) -> str:
    return extract_answer(answer_text(example))


def _prompt_length(sample: EncodedSample) -> int:
    return sum(segment == Segment.PROMPT for segment in sample.segment_ids)


def _generation_budget(model: nn.Module, samples: Sequence[EncodedSample], max_new_tokens: int) -> int:
    """``max_new_tokens``, or what the longest prompt leaves of the model's positions: one number for all rows."""
    limit = getattr(model.config, "max_position_embeddings", None)  # type: ignore[union-attr]
    if limit is None or not samples:
        return max_new_tokens
    return max(1, min(max_new_tokens, limit - max(_prompt_length(sample) for sample in samples)))


def _batches(
    samples: Sequence[EncodedSample], batch_size: int, largest_share: int, between: Callable[[], None]
) -> Iterator[Sequence[EncodedSample]]:
    for start in range(0, largest_share, batch_size):
        between()
        if start < len(samples):
            yield samples[start : start + batch_size]


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off; afterwards each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _greedy_defaults(model: Any, tokenizer: PreTrainedTokenizerBase, pad: int, budget: int) -> Iterator[None]:
    """Plain greedy generation whatever the checkpoint's generation_config.json asks for (sampling, repetition penalty).

    ``generate`` fills every value that its caller leaves open from the model's own defaults: those are set aside.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=budget, do_sample=False, num_beams=1, use_cache=True,
        pad_token_id=pad, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    try:
        yield
    finally:
        model.generation_config = own


def completion_losses(model: nn.Module, rows: Sequence[EncodedSample], pad: int) -> list[float]:
    """Σ −log p(token) over rationale and answer of each row; only counted positions go through the head, in chunks."""
    device = next(model.parameters()).device
    batch = collate(rows, [row.example for row in rows], pad, 1.0, 1.0)
    labelled = LabelledPositions.from_labels(batch.labels).to(device)
    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    hidden = backbone(model)(**inputs, use_cache=False).last_hidden_state  # [B, T, hidden]
    head = model.get_output_embeddings()  # type: ignore[operator]
    chunk = max(1, _CHUNK_ELEMENTS // model.config.vocab_size)  # type: ignore[union-attr, operator]
    flat = hidden.reshape(-1, hidden.shape[-1])
    losses = torch.cat(
        [
            F.cross_entropy(head(flat[index]).float(), target, reduction="none")
            for index, target in zip(labelled.index.split(chunk), labelled.target.split(chunk), strict=True)
        ]
    )
    sums = torch.zeros(len(rows), dtype=torch.float64, device=device)
    return sums.index_add_(0, labelled.index // hidden.shape[1], losses.double()).tolist()


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedSample], pad: int) -> list[str]:
    """The completion of each row's prompt, prompts padded on the left; ``generate`` counts positions by the mask."""
    device = next(model.parameters()).device
    prompts = [row.input_ids[: _prompt_length(row)] for row in rows]
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    generated = model.generate(input_ids=input_ids, attention_mask=mask)[:, width:]
    return tokenizer.batch_decode(generated, skip_special_tokens=True)


def _of_rank(path: Path, rank: int, world_size: int) -> Path:
    return path if world_size == 1 else path.with_name(f"{path.stem}-rank{rank}{path.suffix}")


def _write_predictions(
    path: Path,
    examples: Sequence[Example],
    losses: dict[int, tuple[float, int]],
    completions: dict[int, str],
    correct: dict[int, bool],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i in sorted(completions):
            example, (loss, tokens) = examples[i], losses[i]
            record = {
                "corpus": example.corpus, "place": example.place, "prompt": example.prompt,
                "expected": _expected_answer(example), "predicted": extract_answer(completions[i]),
                "correct": correct[i], "completion": completions[i],
                "cross_entropy": loss / tokens if math.isfinite(loss) else None, "tokens": tokens,
            }  # fmt: skip
            file.write(json_text(record, ensure_ascii=False) + "\n")
