"""Evaluation of a model on held-out rows: cross entropy of the completion, exact match of the generated answer."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kvds.data.batches import collate
from kvds.data.encoding import EncodedSample, encode_examples, prompt_length
from kvds.data.example import Example, written_answer
from kvds.data.labels import LabelledPositions
from kvds.data.text_fidelity import decode_texts
from kvds.durable_files import json_text
from kvds.evaluation.generation import Completion, generate_completions, greedy_defaults
from kvds.kv.families import backbone
from kvds.models.architecture import check_positions
from kvds.models.own_logits import EVALUATED_LOGITS, check_own_logits, head_of, is_plain_head

log = logging.getLogger("kvds")

_CHUNK_ELEMENTS = EVALUATED_LOGITS


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
    ``exact_match`` the share of rows whose greedily generated completion holds the right answer; both answers are read
    from tokens, so that what a tokenizer composes or drops counts against nobody. Rows are sorted by
    length into batches with little padding; positions follow the attention mask, so that the batch size decides about
    speed and nothing else.
    Neither random states nor the model's modes are changed.

    Args:
        model: A whole causal language model on this rank (not sharded: ranks generate different rows).
        tokenizer: Its tokenizer.
        examples: Rows, the same on every rank; this rank judges its share.
        batch_size: Rows per forward.
        max_new_tokens: Tokens generated at most; fewer for a row whose prompt leaves the model fewer positions.
        max_length: Rows with more tokens are left out.
        rank: This rank.
        world_size: Number of ranks.
        all_reduce: Sums a tensor over all ranks in place; None: the shares are not put together.
        progress: Show a bar (on rank 0).
        predictions_path: Also write a JSON line per row: completion, predicted and expected answer, cross entropy. With
            several ranks each writes its own share, ``NAME-rank1.jsonl`` and so on.
        between_batches: Called before each batch, equally often on all ranks, whatever their shares.

    Returns:
        Corpus (and ``"all"``) → ``cross_entropy`` (nats per token), ``perplexity``, ``exact_match`` (0 to 1, of those
        judged), ``samples`` (rows), ``judged`` (rows with an answer that the tokenizer can write) and
        ``cut_completions`` (rows whose completion had not ended). Where there is no such row, means are NaN.

    Raises:
        InputError: rows may have more tokens than the model positions.
    """
    check_positions(model.config, max_length, flag="model")  # type: ignore[arg-type]
    samples = encode_examples(examples, tokenizer, max_length).samples
    left_out = len(examples) - len(samples)
    if left_out and rank == 0:
        log.warning(
            "evaluation: %d rows are longer than --max_length %d tokens and were left out", left_out, max_length
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # Neighbours in length go to different ranks: all are done at about the same time. The longest come first, so that
    # memory that does not suffice is noticed at once.
    share = sorted(samples, key=lambda sample: -len(sample.input_ids))[rank::world_size]
    largest_share = -(-len(samples) // world_size)
    losses: dict[int, tuple[float, int]] = {}
    completions: dict[int, Completion] = {}
    bar = tqdm(total=2 * len(share), desc="evaluate", unit="row", disable=not progress or rank != 0, mininterval=0.5)
    with torch.no_grad(), _evaluation_mode(model), bar:
        if samples:  # the same row on every rank
            shortest = min(samples, key=lambda sample: len(sample.input_ids))
            check_own_logits(model, torch.tensor(shortest.input_ids, device=next(model.parameters()).device))
        for rows in _batches(share, batch_size, largest_share, between_batches):
            for row, loss in zip(rows, completion_losses(model, rows, pad), strict=True):
                losses[row.example] = (loss, row.label_count)
            bar.update(len(rows))
        share = sorted(share, key=lambda sample: -prompt_length(sample))
        with greedy_defaults(model, tokenizer):
            for rows in _batches(share, batch_size, largest_share, between_batches):
                asked = [row for row in rows if examples[row.example].form != "text"]
                found = generate_completions(model, tokenizer, asked, pad, max_new_tokens)
                completions |= {row.example: completion for row, completion in zip(asked, found, strict=True)}
                bar.update(len(rows))

    verdicts = verdicts_of(tokenizer, share, examples, completions)
    if predictions_path is not None:
        _write_predictions(_of_rank(Path(predictions_path), rank, world_size), examples, losses, completions, verdicts)
    corpora = sorted({examples[sample.example].corpus for sample in samples})
    device = next(model.parameters()).device

    def reduce(sums: Tensor) -> Tensor:
        if all_reduce is None or not corpora:
            return sums
        sums = sums.to(device)
        all_reduce(sums)
        return sums

    results = results_by_corpus(corpora, examples, losses, completions, verdicts, reduce)
    asking = sum(examples[sample.example].form != "text" for sample in samples)
    if results["all"]["judged"] < asking and rank == 0:
        log.warning(
            "evaluation: the answers of %d of %d rows cannot be written with the tokenizer, and are not judged",
            asking - results["all"]["judged"], asking,
        )  # fmt: skip
    return results


def results_by_corpus(
    corpora: Sequence[str],
    examples: Sequence[Example],
    losses: dict[int, tuple[float, int]],
    completions: dict[int, Completion],
    verdicts: dict[int, Verdict],
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, dict[str, float]]:
    """What :func:`evaluate_model` returns.

    Args:
        corpora: Names of those that have rows, the same on every rank.
        examples: All rows.
        losses: Row → its cross entropy and how many tokens that is of.
        completions: Row → what was written; a text has none.
        verdicts: Row → its answers.
        reduce: Sums over ranks.
    """
    # Per corpus: Σ loss, tokens, right answers, judged ones, cut completions, rows; fp64, so that the sum over ranks is
    # the mean of one process.
    sums = torch.zeros(len(corpora), 6, dtype=torch.float64)
    for i, (loss, tokens) in losses.items():
        verdict = verdicts[i]
        cut = i in completions and completions[i].cut
        numbers = [loss, tokens, verdict.correct, verdict.expected != "", cut, 1]
        sums[corpora.index(examples[i].corpus)] += torch.tensor(numbers, dtype=torch.float64)
    sums = reduce(sums)
    rows_of = dict(zip(corpora, sums.tolist(), strict=True)) | {"all": sums.sum(0).tolist()}
    return {corpus: _summary(*values) for corpus, values in rows_of.items()}


def in_words(results: dict[str, dict[str, float]]) -> str:
    """The whole of an evaluation on one line."""
    every = results["all"]
    match = f"{100 * every['exact_match']:.1f} %" if every["judged"] else "– (no answer was judged)"
    return (
        f"cross entropy {every['cross_entropy']:.4f}, exact match {match}, {every['cut_completions']} of "
        f"{every['samples']} completions cut before their end"
    )


@dataclass(frozen=True)
class Verdict:
    """Answers of one row, normalised; the expected one is empty where no text of the tokenizer holds it."""

    expected: str
    predicted: str

    @property
    def correct(self) -> bool:
        """Whether both are the same answer, and there is one."""
        return self.expected == self.predicted != ""


def verdicts_of(
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[EncodedSample],
    examples: Sequence[Example],
    completions: dict[int, Completion],
) -> dict[int, Verdict]:
    """Both answers as their tokens say them: the expected one is what a completion of just these tokens would have."""
    labels = [sample.input_ids[prompt_length(sample) : -1] for sample in samples]
    verdicts = {}
    for sample, text in zip(samples, decode_texts(tokenizer, labels), strict=True):
        row, written = examples[sample.example], completions.get(sample.example)
        both = ("", "") if written is None else (written_answer(row, said) for said in (text, written.text))
        verdicts[sample.example] = Verdict(*both)
    return verdicts


def _summary(loss: float, tokens: float, right: float, judged: float, cut: float, rows: float) -> dict[str, float]:
    cross_entropy = loss / tokens if tokens else math.nan
    return {
        "cross_entropy": cross_entropy,
        "perplexity": math.exp(cross_entropy) if not cross_entropy > 700 else math.inf,
        "exact_match": right / judged if judged else math.nan,
        "samples": int(rows),
        "judged": int(judged),
        "cut_completions": int(cut),
    }


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


def completion_losses(model: nn.Module, rows: Sequence[EncodedSample], pad: int) -> list[float]:
    """Σ −log p(token) over rationale and answer of each row; only counted positions go through the head, in chunks."""
    device = next(model.parameters()).device
    batch = collate(rows, [row.example for row in rows], pad, 1.0, 1.0)
    labelled = LabelledPositions.from_labels(batch.labels).to(device)
    inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
    hidden = backbone(model)(**inputs, use_cache=False).last_hidden_state  # [B, T, hidden]
    return row_losses(model, hidden, labelled)


def row_losses(model: nn.Module, hidden: Tensor, labelled: LabelledPositions) -> list[float]:
    """Σ −log p(token) over the labelled positions of each row of ``hidden [B, T, hidden]``."""
    head = head_of(model, plain=is_plain_head(model))
    chunk = max(1, _CHUNK_ELEMENTS // model.config.vocab_size)  # type: ignore[union-attr, operator]
    flat = hidden.reshape(-1, hidden.shape[-1])
    losses = torch.cat(
        [
            F.cross_entropy(head(flat[index]).float(), target, reduction="none")
            for index, target in zip(labelled.index.split(chunk), labelled.target.split(chunk), strict=True)
        ]
    )
    sums = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
    return sums.index_add_(0, labelled.index // hidden.shape[1], losses.double()).tolist()


def _of_rank(path: Path, rank: int, world_size: int) -> Path:
    return path if world_size == 1 else path.with_name(f"{path.stem}-rank{rank}{path.suffix}")


def _write_predictions(
    path: Path,
    examples: Sequence[Example],
    losses: dict[int, tuple[float, int]],
    completions: dict[int, Completion],
    verdicts: dict[int, Verdict],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i in sorted(losses):
            example, (loss, tokens) = examples[i], losses[i]
            written = completions.get(i, Completion("", cut=False))
            record = {
                "corpus": example.corpus, "place": example.place, "prompt": example.prompt,
                "expected": verdicts[i].expected, "predicted": verdicts[i].predicted,
                "correct": verdicts[i].correct, "completion": written.text, "cut": written.cut,
                "cross_entropy": loss / tokens if tokens else None, "tokens": tokens,
            }  # fmt: skip
            file.write(json_text(record, ensure_ascii=False) + "\n")
