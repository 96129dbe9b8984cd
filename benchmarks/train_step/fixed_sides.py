"""The losses that a step of ``forms`` can have, and for each what stands opposite the student."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvds.align.loss import state_names
from kvds.config.settings import AlignmentSettings
from kvds.data.encoding import EncodedSample
from kvds.distillation.step import LossWeights
from kvds.kv import select_tokens
from kvds.teacher.cached import CachedTeacher, write_teacher_cache
from kvds.teacher.teacher import Teacher

# By name: the weights of the parts, and whether keys and values come from disk.
LOSSES = {
    "kv": (LossWeights(task=1.0, kv=1.0), False),
    "task": (LossWeights(task=1.0), False),
    "kv from disk": (LossWeights(task=1.0, kv=1.0), True),
    "logits": (LossWeights(task=0.0, logit_kd=1.0), False),
    "kv and logits": (LossWeights(task=1.0, kv=1.0, logit_kd=1.0), False),
}


class FixedSides:
    """Teachers, one per kind of loss, over one model."""

    def __init__(
        self, model: nn.Module, settings: AlignmentSettings, samples: Sequence[EncodedSample], device: torch.device
    ) -> None:
        self._model, self._settings, self._samples, self._device = model, settings, samples, device
        self._made: dict[str, Any] = {}
        self._folders: list[tempfile.TemporaryDirectory[str]] = []

    def of(self, loss: str) -> Teacher | CachedTeacher | None:
        """The teacher of a loss, made when first asked for; None: it reads none."""
        if loss not in self._made:
            self._made[loss] = self._make(*LOSSES[loss])
        return self._made[loss]

    def _make(self, weights: LossWeights, from_disk: bool) -> Teacher | CachedTeacher | None:
        if not (weights.kv or weights.logit_kd):
            return None
        teacher = Teacher(
            self._model, device=self._device, wants_states=weights.kv > 0, wants_hidden=weights.logit_kd > 0,
            parts=state_names(self._settings),
        )  # fmt: skip
        return self._on_disk(teacher) if from_disk else teacher

    def _on_disk(self, teacher: Teacher) -> CachedTeacher:
        self._folders.append(tempfile.TemporaryDirectory())  # for as long as this lives
        dtype = next(self._model.parameters()).dtype
        folder, made_of = Path(self._folders[-1].name), {"parts": " ".join(state_names(self._settings))}
        write_teacher_cache(
            folder, teacher, self._samples,
            lambda rows: select_tokens("full", None, rows.segment_ids, rows.attention_mask), fingerprint=made_of,
            store="bf16" if dtype == torch.bfloat16 else "fp32", batch_size=16, shard_samples=64, device=self._device,
        )  # fmt: skip
        return CachedTeacher(folder, dtype=dtype, device=self._device, fingerprint=made_of)
