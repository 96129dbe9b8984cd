"""On-policy rows: at each step the student writes the completions of some samples anew, and these are trained on.

Which samples, and by which random numbers, is a function of seed, step and sample: a run that goes on from a
checkpoint writes what the uninterrupted one wrote. Ranks share the work, tell each other what they wrote, and deal the
step out by what its rows hold now.

Source: Agarwal et al., On-Policy Distillation of Language Models (2024), algorithm 1; there a share of the steps, here
of each step's samples.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedTokenizerBase

from kvds.config import RunConfig
from kvds.data.batches import TokenBatch
from kvds.data.encoding import EncodedSample, prompt_length
from kvds.data.loader import BatchLoader
from kvds.data.on_policy_rows import replaced_rows, with_completion
from kvds.evaluation.generation import greedy_defaults
from kvds.evaluation.sampling import Sampling, sampled_completions
from kvds.kv import row_draws
from kvds.models.generation import end_tokens
from kvds.training.meters import PhaseTimer
from kvds.training.student_copy import StudentCopy

log = logging.getLogger("kvds")


class OnPolicyRows:
    """A run's micro-batches with the student's own completions among them; every rank calls each method.

    Args:
        cfg: The run.
        loader: Of the training rows.
        student: In the engine's module.
        tokenizer: Of the run.
        device: Of this rank.

    Attributes:
        figures: Of the step asked for last, scalars on the device: tokens of a completion, the share that ended with an
            end token, and the share of the step's samples that were replaced.
    """

    def __init__(
        self, cfg: RunConfig, loader: BatchLoader, student: Any, tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._cfg, self._loader, self._tokenizer, self._device = cfg, loader, tokenizer, device
        self._copy = StudentCopy(student, device)
        self._sampling = Sampling(
            cfg.on_policy_max_new_tokens, cfg.max_length, cfg.on_policy_temperature, cfg.on_policy_top_p,
            max(tokenizer.get_vocab().values()) + 1,
        )  # fmt: skip
        pad = tokenizer.pad_token_id
        self._pad = tokenizer.eos_token_id if pad is None else pad
        self._ends = set(end_tokens(self._copy.model, tokenizer))
        self.figures: dict[str, Tensor] = {}

    def step(self, step: int, timer: PhaseTimer, *, judged: bool = True) -> list[TokenBatch]:
        """This rank's micro-batches of 0-based optimizer step ``step``, by the student's weights as they are.

        Args:
            step: Optimizer step.
            timer: Gets ``generate``.
            judged: Whether a loss still reads the teacher; where the KV loss was given up and was the only one,
                nothing is written any more.
        """
        if not judged:
            self.figures = {}
            return self._loader.out_of_turn(step)
        ids = self._loader.sample_ids(step)
        chosen = replaced_rows(
            ids, self._cfg.on_policy_share, before=self._loader.samples_before(step), seed=self._cfg.seed, step=step
        )
        with timer.phase("generate"):
            written = self._written(chosen, step) if chosen else {}
        self._note(written, sum(i >= 0 for i in ids))
        return self._loader.step_with(step, written)

    def _written(self, chosen: list[int], step: int) -> dict[int, EncodedSample]:
        """The rows in place of the samples ``chosen``, the same on every rank."""
        self._copy.refresh()
        rows = {i: self._loader.samples[i] for i in chosen}
        # Of like prompts on all ranks, so that all are done at about the same time.
        ordered = sorted(chosen, key=lambda i: (prompt_length(rows[i]), i))
        mine = ordered[dist.get_rank() :: dist.get_world_size()]
        seeds = row_draws(self._cfg.seed, step, torch.tensor(mine, dtype=torch.int64)).tolist()
        with torch.no_grad(), greedy_defaults(self._copy.model, self._tokenizer):
            completions = sampled_completions(
                self._copy.model, [rows[i] for i in mine], seeds, self._pad, self._sampling, 4 * self._cfg.batch_size
            )
        # Whoever is done first waits here, for all that the others write.
        shares: list[dict[int, list[int]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(shares, dict(zip(mine, completions, strict=True)))
        found = {i: completion for share in shares for i, completion in share.items()}
        return {i: with_completion(rows[i], found[i]) for i in chosen}

    def _note(self, written: dict[int, EncodedSample], samples: int) -> None:
        figures = {"on_policy/share": len(written) / max(1, samples)}
        if written:
            figures["on_policy/completion_tokens"] = sum(row.taught_count for row in written.values()) / len(written)
            figures["on_policy/ended"] = sum(row.input_ids[-1] in self._ends for row in written.values()) / len(written)
        self.figures = {name: torch.tensor(value, device=self._device) for name, value in figures.items()}
