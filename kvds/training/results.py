"""Results of a run: its student judged on held-out rows, and exported with its aligner."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from kvds.checkpoint.aligner_file import ALIGNER_FILE, save_aligner
from kvds.checkpoint.export import STUDENT_FOLDER, gather_parameters, plain_student, save_student
from kvds.config import RunConfig
from kvds.data.run_data import RunData
from kvds.distillation.step import LossWeights
from kvds.distillation.step_input_builder import StepInputBuilder
from kvds.distributed.process_group import all_reduce_sum
from kvds.evaluation.kv_loss import held_out_kv_loss
from kvds.evaluation.model import evaluate_model
from kvds.models.adapters import ADAPTER_FOLDER, adapters_of, save_adapters


class RunResults:
    """Evaluation and export of an engine's student; every rank calls each method.

    Args:
        cfg: The run.
        tokenizer: Of the run.
        data: Its held-out rows.
        engine: What trains.
        inputs: Makes a step's input of a batch, for the KV loss on held-out rows.
        device: Of this rank.
        between_batches: Called between batches of an evaluation.
    """

    def __init__(
        self, cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, data: RunData, engine: Any, inputs: StepInputBuilder,
        device: torch.device, between_batches: Callable[[], None],
    ) -> None:  # fmt: skip
        self._cfg, self._tokenizer, self._data, self._engine = cfg, tokenizer, data, engine
        self._inputs, self._device, self._between_batches = inputs, device, between_batches

    def plain_student(self) -> nn.Module:
        """The student as a plain model on this rank, for generation: under ZeRO-3 no rank could generate alone."""
        student = self._engine.module.student
        whole = gather_parameters(student, keep=True)
        return plain_student(student.config, whole, student.generation_config, adapters=adapters_of(student)).to(
            self._device
        )

    def evaluate(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Corpus, or ``all`` → metric → value, of ``model`` on the held-out rows."""
        cfg = self._cfg
        results = evaluate_model(
            model, self._tokenizer, self._data.eval_examples, batch_size=4 * cfg.batch_size,
            max_new_tokens=cfg.max_new_tokens, max_length=cfg.max_length, rank=dist.get_rank(),
            world_size=dist.get_world_size(), all_reduce=all_reduce_sum, progress=dist.get_rank() == 0,
            between_batches=self._between_batches,
        )  # fmt: skip
        # A cache holds the training rows alone.
        if cfg.uses_kv and self._data.eval_loader is not None and cfg.teacher_cache is None:
            inputs = partial(self._inputs, weights=LossWeights(kv=1.0), match=True)
            results["all"] |= held_out_kv_loss(
                self._engine, self._data.eval_loader, inputs, between_batches=self._between_batches
            )
        return results

    def export(self, model: nn.Module, aligner_config: dict[str, Any] | None, folder: Path) -> None:
        """Write ``student/`` to the run's ``folder``, where there is an aligner ``map_aligner.pt``, and where adapters
        were trained ``adapter/``.
        """
        main_rank, aligner = dist.get_rank() == 0, self._engine.module.aligner
        adapters = adapters_of(self._engine.module.student)
        if adapters is not None:
            trained = gather_parameters(self._engine.module.student, keep=main_rank, trained=True)
            if main_rank:
                save_adapters(adapters, trained, folder / ADAPTER_FOLDER)
        aligner_state = None if aligner is None else gather_parameters(aligner, keep=main_rank)
        if main_rank:
            save_student(model, self._tokenizer, folder / STUDENT_FOLDER, max_new_tokens=self._cfg.max_new_tokens)
            if aligner_state is not None and aligner_config is not None:
                save_aligner(aligner_config, aligner_state, folder / ALIGNER_FILE)
