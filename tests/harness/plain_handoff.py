"""Handoff in training as a plain loop: a row at a time, without padding, full logits of Hugging Face's model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from kvds.handoff.cache_map import CacheMap, source_layers
from kvds.handoff.fitting import fit_map
from kvds.handoff.following_map import FollowingMap
from kvds.handoff.moments import MapMoments
from kvds.handoff.reading import cache_argument
from kvds.kv import KVCapture, KVShape, KVStates


def states_of(model: nn.Module, ids: Tensor) -> KVStates:
    with KVCapture(model) as capture:
        model(input_ids=ids, use_cache=False)
    return capture.states.detach()


class PlainHandoff:
    """The losses that ``--handoff_weight`` adds, and the map that follows the student."""

    def __init__(self, teacher: Any, student: Any, calibration: Iterable[Any]) -> None:
        self._teacher, self._student = teacher, student
        shapes = KVShape.from_config(teacher.config), KVShape.from_config(student.config)
        sources = source_layers(shapes[1].num_hidden_layers, shapes[0].num_hidden_layers, 4)
        fitted, self.map = CacheMap(*shapes, sources), FollowingMap(*shapes, sources)
        moments = MapMoments(fitted, torch.device("cpu"))
        for batch in calibration:
            for row, number in zip(range(len(batch.input_ids)), batch.sample_ids.tolist(), strict=True):
                ids, _, prompt = self._row(batch, row)
                everything = torch.ones(1, prompt, dtype=torch.bool)
                both = states_of(teacher, ids[:, :prompt]), states_of(student, ids[:, :prompt])
                moments.update(*both, everything, torch.tensor([number % 2]))
        fit_map(fitted, moments)
        self.map.start(fitted, moments)

    @staticmethod
    def _row(batch: Any, row: int) -> tuple[Tensor, Tensor, int]:
        length = int((batch.segment_ids[row] != 0).sum())
        prompt = int((batch.segment_ids[row] == 1).sum())
        return batch.input_ids[row : row + 1, :length], batch.labels[row, :length], prompt

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Cross entropy per label through the cache, and the map's loss per label."""
        answers, followed, count = [], [], 0
        for row in range(len(batch.input_ids)):
            ids, labels, prompt = self._row(batch, row)
            before = prompt - 1
            teacher, own = (states_of(model, ids[:, :before]) for model in (self._teacher, self._student))
            made = self.map(teacher, own, torch.ones(1, before, dtype=torch.bool))
            followed.append(made.loss)
            cache, positions = DynamicCache(), torch.arange(before)[None]
            cos, sin = self._student.model.rotary_emb(ids.float(), positions)
            for layer, (keys, values) in enumerate(zip(*made.states, strict=True)):
                cache.update(apply_rotary_pos_emb(keys, keys, cos, sin)[1], values, layer)
            logits = self._student(input_ids=ids[:, before:], **{cache_argument(self._student): cache}).logits[0]
            answers.append(F.cross_entropy(logits[:-1], labels[prompt:], reduction="sum"))
            count += len(labels) - prompt
        return torch.stack(answers).sum() / count, torch.stack(followed).sum() / count
