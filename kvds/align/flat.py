"""The flat alignment, the baseline: heads flattened, one linear map per layer for keys and one for values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvds.align.layer_map import HARD_MAPS, near_diagonal_logits
from kvds.align.loss import PARTS, AlignmentLoss, TeacherStatistics, combine
from kvds.align.structured import semi_orthogonal
from kvds.kv import KVShape, KVStates, Selection, gather_positions
from kvds.ops.reference import penalty


class FlatPart(nn.Module):
    """The maps of keys, or of values: ``projected_i = scale_i · (x_i @ weight_i + bias_i) + mean_i`` over flattened
    heads.

    Attributes:
        weight: ``[L, H_x·D_x, H_y·D_y]``, one map per pair of layers.
        bias: ``[L, H_y·D_y]``.
        layer_logits: ``[L_y, L_x]`` with a learned layer mix; absent with a hard map.
    """

    def __init__(self, student: KVShape, teacher: KVShape, settings: Any, seed: int) -> None:
        super().__init__()
        self.to_teacher = settings.direction == "student_to_teacher"
        source, target = (student, teacher) if self.to_teacher else (teacher, student)
        self.loss_name = settings.kv_loss
        self.statistics = TeacherStatistics(teacher)
        hard = HARD_MAPS.get(settings.layer_map or "endpoint")
        self.pairs = (
            None if hard is None else list(enumerate(hard(student.num_hidden_layers, teacher.num_hidden_layers)))
        )
        layers = target.num_hidden_layers if self.pairs is None else len(self.pairs)
        width_x = source.num_key_value_heads * source.head_dim
        width_y = target.num_key_value_heads * target.head_dim
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(
            semi_orthogonal(width_x, width_y, generator).expand(layers, width_x, width_y).clone()
        )
        self.bias = nn.Parameter(torch.zeros(layers, width_y))
        if self.pairs is None:
            self.layer_logits = nn.Parameter(near_diagonal_logits(layers, source.num_hidden_layers))
        if settings.aligner_update == "frozen":
            self.requires_grad_(False)

    def layer_mix(self) -> Tensor:
        """``[L_y, L_x]`` weights over source layers, rows summing to 1."""
        if self.pairs is not None:
            return torch.eye(len(self.pairs), device=self.weight.device, dtype=self.weight.dtype)
        return self.layer_logits.softmax(1)

    def target_statistics(self) -> tuple[Tensor, Tensor]:
        """``mean [L_y, H_y·D_y]`` added to the projection and ``scale [L_y]``; see the structured part for the
        reasons.
        """
        mean, scale = self.statistics.mean.flatten(1), self.statistics.scale
        if self.pairs is not None:
            chosen = [teacher for _, teacher in self.pairs]
            mean, scale = mean[chosen], scale[chosen]
        if self.to_teacher:
            return mean, scale
        if self.pairs is None:
            scale = near_diagonal_logits(*self.layer_logits.shape).to(scale).softmax(1) @ scale
        return torch.zeros_like(self.bias), scale

    def forward(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], index: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and losses per pair of layers of one part. Tuples of ``[B, H, T, D]``, one per layer."""
        if self.pairs is not None:
            student = tuple(student[i] for i, _ in self.pairs)
            teacher = tuple(teacher[i] for _, i in self.pairs)
        source, target = (student, teacher) if self.to_teacher else (teacher, student)

        def selected(layer: Tensor) -> Tensor:
            # Filled before anything is computed: what lies under the mask may be NaN, and 0 · NaN would reach
            # gradients.
            rows = gather_positions(layer, index).transpose(1, 2).flatten(2)  # [B, M, H·D]
            return torch.where(mask[..., None], rows, rows.new_zeros(()))

        rows = [selected(layer) for layer in source]
        mean, scale = self.target_statistics()
        gain = scale if self.to_teacher else torch.ones_like(scale)
        mix = None if self.pairs is not None else self.layer_mix()
        count = (mask.sum() * target[0].shape[1] * target[0].shape[3]).clamp_min(1)
        losses = []
        for i, layer in enumerate(target):
            mixed = (
                rows[i]
                if mix is None
                else torch.stack([w.to(r.dtype) * r for w, r in zip(mix[i], rows, strict=True)]).sum(0)
            )
            projected = (
                gain[i] * (mixed @ self.weight[i].to(mixed.dtype)).to(scale.dtype) + scale[i] * self.bias[i] + mean[i]
            )
            elements = penalty((projected - selected(layer)) / scale[i], self.loss_name)
            losses.append(torch.where(mask[..., None], elements, elements.new_zeros(())).sum() / count)
        per_layer = torch.stack(losses)
        return per_layer.mean(), per_layer.detach()


class FlatAligner(nn.Module):
    """Flat alignment of keys and of values, maps of their own for each.

    Args:
        student: Its KV shape.
        teacher: Its KV shape.
        settings: Fields of :class:`kvds.settings.AlignmentSettings`, and ``seed``.
    """

    def __init__(self, student: KVShape, teacher: KVShape, settings: Any) -> None:
        super().__init__()
        self.student_shape, self.teacher_shape, self.settings = student, teacher, settings
        seed = int(getattr(settings, "seed", 0))
        self.parts = nn.ModuleDict(
            {name: FlatPart(student, teacher, settings, seed + i) for i, name in enumerate(PARTS[settings.kv_parts])}
        )

    def forward(self, student: KVStates, teacher: KVStates, selection: Selection) -> AlignmentLoss:
        """The mean over the selected positions of this micro-batch."""
        return combine(
            {
                name: part(getattr(student, f"{name}s"), getattr(teacher, f"{name}s"), selection.index, selection.mask)
                for name, part in self.parts.items()
            }
        )
