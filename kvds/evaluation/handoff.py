"""Evaluation of a handoff that cannot fool itself: the mapped cache beside the student's own and beside wrong ones.

A map can look right by its likelihood alone and carry nothing: wrong caches too make an answer likelier than none. So
each row is judged with six caches, by the cross entropy of its completion and by the answer that is written from it:

* ``own``: the student reads the prompt itself;
* ``mapped``: the teacher reads it, the map fills the cache;
* ``another``: the teacher reads another row's prompt, as many tokens of it;
* ``shuffled``: the mapped cache, its tokens in another order;
* ``zeros``: a cache of zeros;
* ``none``: nothing but the last token of the prompt.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from kvds.data.batches import collate
from kvds.data.encoding import EncodedSample, prompt_length
from kvds.data.example import Example
from kvds.errors import InputError
from kvds.evaluation.generation import Completion, generate_completions, greedy_defaults
from kvds.evaluation.model import results_by_corpus, row_losses, verdicts_of
from kvds.handoff.attention_error import attention_output_error, own_attention
from kvds.handoff.calibration import batches_of
from kvds.handoff.continuation import Continuation, continue_from, first_prompt_length
from kvds.handoff.model import HandoffModel, generate_from
from kvds.handoff.reading import read_states
from kvds.kv import KVStates

CONDITIONS = ("own", "mapped", "another", "shuffled", "zeros", "none")
WRONG = CONDITIONS[2:]
"""Caches with which answers must be worse than with the mapped one."""

Reader = Callable[[Tensor, Tensor], tuple[KVStates, Tensor]]
"""From prompts without their last token, ``[B, T]`` ids and mask, to a cache and what of it may be seen."""

Results = dict[str, dict[str, dict[str, float]]]


class _Writer:
    """The student with caches of one condition, as :func:`generate_completions` calls a model."""

    def __init__(self, student: Any, reader: Reader) -> None:
        self._student, self._reader = student, reader
        self.config, self.parameters = student.config, student.parameters

    @property
    def generation_config(self) -> GenerationConfig:
        return self._student.generation_config

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **limits: Any) -> Tensor:
        before = attention_mask[:, :-1].bool()
        states, seen = (None, before) if not before.any() else self._reader(input_ids[:, :-1], before)
        return generate_from(self._student, states, seen, input_ids, attention_mask, **limits)


class _Readers:
    """A reader for each condition.

    Args:
        handoff: Teacher, map, student.
        prompts: All prompts that will be read, for each of which another one is found.
    """

    def __init__(self, handoff: HandoffModel, prompts: Sequence[tuple[int, ...]]) -> None:
        self._handoff = handoff
        different = sorted({prompt[:-1] for prompt in prompts}, key=lambda prompt: (len(prompt), prompt))
        # The next in length: mostly of as many tokens.
        self._partner = dict(zip(different, [*different[1:], *different[:1]], strict=True))

    def own(self, ids: Tensor, mask: Tensor) -> tuple[KVStates, Tensor]:
        return read_states(self._handoff.student, ids, mask), mask

    def mapped(self, ids: Tensor, mask: Tensor) -> tuple[KVStates, Tensor]:
        return self._handoff.read(ids, mask), mask

    def another(self, ids: Tensor, mask: Tensor) -> tuple[KVStates, Tensor]:
        others = ids.clone()
        for row, (tokens, real) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
            own = tuple(token for token, there in zip(tokens, real, strict=True) if there)
            if own:
                partner = self._partner[own] or own
                repeated = (partner * (1 + len(own) // len(partner)))[: len(own)]
                others[row, -len(own) :] = torch.tensor(repeated)
        return self._handoff.read(others, mask), mask

    def shuffled(self, ids: Tensor, mask: Tensor) -> tuple[KVStates, Tensor]:
        order = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        for row, (tokens, count) in enumerate(zip(ids.tolist(), mask.sum(1).tolist(), strict=True)):
            generator = torch.Generator().manual_seed(zlib.crc32(str(tokens[len(tokens) - count :]).encode()))
            order[row, len(tokens) - count :] = len(tokens) - count + torch.randperm(count, generator=generator)
        index = order.to(ids.device)[:, None, :, None]
        states = self._handoff.read(ids, mask)
        return KVStates(*(tuple(x.gather(2, index.expand_as(x)) for x in part) for part in states)), mask

    def zeros(self, ids: Tensor, mask: Tensor) -> tuple[KVStates, Tensor]:
        shape, own = self._handoff.map.student, next(self._handoff.student.parameters())
        layer = own.new_zeros(len(ids), shape.num_key_value_heads, ids.shape[1], shape.head_dim)
        return KVStates(*[(layer,) * shape.num_hidden_layers] * 2), mask

    def none(self, ids: Tensor, mask: Tensor) -> tuple[KVStates, Tensor]:
        return self.zeros(ids, mask)[0], torch.zeros_like(mask)


@torch.no_grad()
def evaluate_handoff(
    handoff: HandoffModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    samples: Sequence[EncodedSample],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    conditions: Sequence[str] = CONDITIONS,
    progress: bool = True,
) -> Results:
    """Judge each of the conditions on held-out rows.

    Args:
        handoff: Teacher, map, student.
        tokenizer: Of both.
        examples: All rows.
        samples: Those that are judged, as tokens.
        batch_size: Rows per forward.
        max_new_tokens: Tokens generated at most.
        conditions: Of :data:`CONDITIONS`.
        progress: Show a bar.

    Returns:
        Condition → corpus (and ``"all"``) → what :func:`kvds.evaluation.model.evaluate_model` has of each, and
        ``attention_error``, the mean over layers and rows (of all but ``none``; corpora together).

    Raises:
        InputError: fewer than two different prompts: none would be another one's; or a conversation of several turns.
    """
    for sample in samples:
        if prompt_length(sample) != first_prompt_length(sample):
            raise InputError(
                f"{examples[sample.example].place}: a conversation of several turns; expected one question and its "
                "answer, which the student gives from the cache of the question"
            )
    prompts = [sample.input_ids[: prompt_length(sample)] for sample in samples]
    if samples and not any(prompts):
        raise InputError("handoff: the held-out rows are texts, which have no prompt to hand off; expected prompts")
    if len({prompt[:-1] for prompt in prompts}) < 2:
        raise InputError(
            f"handoff: {len(samples)} held-out rows, of one prompt; expected at least two different ones (a larger "
            "--subset_size)"
        )
    readers = _Readers(handoff, prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    corpora = sorted({examples[sample.example].corpus for sample in samples})
    results: Results = {}
    with tqdm(total=len(conditions) * len(samples), desc="handoff", unit="row", disable=not progress) as bar:
        for name in conditions:
            reader = getattr(readers, name)
            losses: dict[int, tuple[float, int]] = {}
            completions: dict[int, Completion] = {}
            errors: list[float] = []
            with greedy_defaults(handoff.student, tokenizer):
                for rows in _batches(samples, prompts, batch_size):
                    found, error = _losses(handoff.student, reader, rows, pad, compared=name != "none")
                    losses |= {row.example: (loss, row.label_count) for row, loss in zip(rows, found, strict=True)}
                    errors += [error] * len(rows)
                    written = generate_completions(
                        _Writer(handoff.student, reader), tokenizer, rows, pad, max_new_tokens
                    )
                    completions |= {row.example: text for row, text in zip(rows, written, strict=True)}
                    bar.update(len(rows))
            verdicts = verdicts_of(tokenizer, samples, examples, completions)
            results[name] = results_by_corpus(corpora, examples, losses, completions, verdicts)
            results[name]["all"]["attention_error"] = sum(errors) / len(errors)
    return results


def _batches(
    samples: Sequence[EncodedSample], prompts: Sequence[Sequence[int]], batch_size: int
) -> Iterator[list[EncodedSample]]:
    for numbers in batches_of(prompts, batch_size):
        yield [samples[i] for i in numbers]


def _losses(
    student: Any, reader: Reader, rows: Sequence[EncodedSample], pad: int, *, compared: bool
) -> tuple[list[float], float]:
    """Cross entropy of each row's completion, and the attention-output error against the student's own cache."""
    device = next(student.parameters()).device
    batch = collate(rows, [row.example for row in rows], pad, 1.0, 1.0)
    place, batch = Continuation.from_batch(batch).to(device), batch.to(device)
    ids = batch.input_ids.gather(1, place.prompt_index).masked_fill(~place.prompt_mask, pad)
    states, seen = reader(ids, place.prompt_mask)
    losses = row_losses(student, continue_from(student, states, place, batch.input_ids, seen=seen), place.labelled)
    if not compared:
        return losses, float("nan")
    own = own_attention(student, batch.input_ids, batch.attention_mask)
    return losses, float(attention_output_error(student, own, states, place).mean())


def wrong_caches_that_hurt(results: Results) -> dict[str, bool]:
    """Wrong condition → whether its answers are likelier wrong *and* less often right than those of the mapped cache.

    One that does not hurt says that the rows can be answered without the prompt, or that the map carries nothing.
    """
    mapped = results["mapped"]["all"]
    return {
        name: results[name]["all"]["cross_entropy"] > mapped["cross_entropy"]
        and results[name]["all"]["exact_match"] < mapped["exact_match"]
        for name in WRONG
        if name in results
    }
