"""The structured alignment: a layer map, a head map and a dimension map, kept apart."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kvds.align.layer_map import HARD_MAPS, near_diagonal_logits
from kvds.align.loss import PARTS, AlignmentLoss, TeacherStatistics, combine
from kvds.errors import InputError
from kvds.kv import KVShape, KVStates, Selection, group_slices
from kvds.ops import map_projection_loss


def semi_orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """``[rows, columns]`` with orthonormal rows or columns, whichever are fewer, scaled to keep the variance per
    element.
    """
    matrix = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator))[0]
    matrix = matrix if rows >= columns else matrix.T
    return matrix * math.sqrt(max(1.0, columns / rows))


class StructuredPart(nn.Module):
    """The maps of keys, or of values, in standardised units.

    With ``source`` the moving side: ``projected_i = scale_i · Σ_l softmax(layer_logits)_il Σ_h head_mix_jh source_lh @
    dim_proj
    + mean_i + scale_i · bias_i``, compared with layer i of ``target`` in units of ``scale_i``. So a learning rate
    means the same
    for any teacher, and the constant offset of its keys is there from the start.

    Attributes:
        layer_logits: ``[L_y, L_x]``; absent with a hard layer map.
        head_mix: ``[H_y, H_x]``, or per layer ``[L_y, H_y, H_x]`` where dimension maps are per layer and head.
        dim_proj: ``[D_x, D_y]``, or ``[L_y, H_y, D_x, D_y]``.
        bias: ``[L_y, H_y, D_y]``.
    """

    def __init__(self, student: KVShape, teacher: KVShape, settings: Any, seed: int) -> None:
        super().__init__()
        to_teacher = settings.direction == "student_to_teacher"
        source, target = (student, teacher) if to_teacher else (teacher, student)
        self.to_teacher = to_teacher
        self.impl, self.loss_name = settings.impl, settings.kv_loss
        self.statistics = TeacherStatistics(teacher)
        hard = HARD_MAPS.get(settings.layer_map or "learned")
        # A hard map pairs student layer i with one teacher layer: one source per target, and no other layer is read.
        self.pairs = (
            None if hard is None else list(enumerate(hard(student.num_hidden_layers, teacher.num_hidden_layers)))
        )
        layers = target.num_hidden_layers if self.pairs is None else len(self.pairs)
        heads_x, heads_y = source.num_key_value_heads, target.num_key_value_heads
        self.layer_slices = _paired_groups(
            layers, source.num_hidden_layers if self.pairs is None else layers, settings.layer_groups, "layer_groups"
        )
        self.head_slices = _paired_groups(heads_y, heads_x, settings.head_groups, "head_groups")

        generator = torch.Generator().manual_seed(seed)
        uniform = settings.map_proj_init_uniform
        if self.pairs is None:
            logits = (
                torch.zeros(layers, source.num_hidden_layers)
                if uniform
                else near_diagonal_logits(layers, source.num_hidden_layers)
            )
            self.layer_logits = nn.Parameter(logits)
        heads = (
            torch.full((heads_y, heads_x), 1 / heads_x)
            if uniform
            else near_diagonal_logits(heads_y, heads_x).softmax(1)
        )
        shape = () if settings.map_proj_share_dim else (layers, heads_y)
        self.head_mix = nn.Parameter(heads.expand(*shape[:1], heads_y, heads_x).clone())
        projection = semi_orthogonal(source.head_dim, target.head_dim, generator)
        self.dim_proj = nn.Parameter(projection.expand(*shape, *projection.shape).clone())
        self.bias = nn.Parameter(torch.zeros(layers, heads_y, target.head_dim))
        if settings.aligner_update == "frozen":
            self.requires_grad_(False)

    def layer_mix(self) -> Tensor:
        """``[L_y, L_x]`` weights over source layers, rows summing to 1, zero outside a target layer's group."""
        if self.pairs is not None:
            return torch.eye(len(self.pairs), device=self.head_mix.device, dtype=self.head_mix.dtype)
        blocks = [self.layer_logits[y, x].softmax(1) for y, x in self.layer_slices]
        return torch.block_diag(*blocks) if len(blocks) > 1 else blocks[0]

    def target_statistics(self) -> tuple[Tensor, Tensor]:
        """``mean [L_y, H_y, D_y]`` added to the projection and ``scale [L_y]``, both of the teacher.

        Towards the student the projection keeps no mean (the map's bias learns it) and its unit is the teacher's, mixed
        by the depth of the layers: a unit taken from the student could be lowered by shrinking it.
        """
        mean, scale = self.statistics.mean, self.statistics.scale
        if self.to_teacher:
            if self.pairs is not None:
                chosen = [teacher for _, teacher in self.pairs]
                mean, scale = mean[chosen], scale[chosen]
            return mean, scale
        if self.pairs is not None:
            scale = scale[[teacher for _, teacher in self.pairs]]
        else:
            scale = near_diagonal_logits(*self.layer_logits.shape).to(scale).softmax(1) @ scale
        return torch.zeros_like(self.bias), scale

    def forward(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], index: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and losses per target layer of one part. Tuples of ``[B, H, T, D]``, one per layer."""
        if self.pairs is not None:
            student = tuple(student[i] for i, _ in self.pairs)
            teacher = tuple(teacher[i] for _, i in self.pairs)
        source, target = (student, teacher) if self.to_teacher else (teacher, student)
        mean, scale = self.target_statistics()
        # Towards the student the source is in the teacher's units already.
        gain = scale if self.to_teacher else torch.ones_like(scale)
        bias = mean + scale[:, None, None] * self.bias
        dtype = source[0].dtype
        layer_mix = gain[:, None] * self.layer_mix()
        total, layers = None, []
        for y, x in self.layer_slices:
            group_total, group_layers = None, None
            for j, h in self.head_slices:
                heads = tuple(layer[:, h] for layer in source[x]), tuple(layer[:, j] for layer in target[y])
                whole = len(self.head_slices) == 1
                loss, per_layer = map_projection_loss(
                    source[x] if whole else heads[0],
                    target[y] if whole else heads[1],
                    layer_mix[y, x].to(dtype),
                    self.head_mix[..., j, h][y if self.head_mix.dim() == 3 else ...].to(dtype),
                    (self.dim_proj[y, j] if self.dim_proj.dim() == 4 else self.dim_proj).to(dtype),
                    bias=bias[y, j].to(dtype),
                    source_index=index,
                    target_index=index,
                    mask=mask,
                    scale=scale[y],
                    loss=self.loss_name,
                    impl=self.impl,
                )
                share = (j.stop - j.start) / self.bias.shape[1]
                group_total = loss * share if group_total is None else group_total + loss * share
                group_layers = per_layer * share if group_layers is None else group_layers + per_layer * share
            assert group_total is not None and group_layers is not None
            weighted = group_total * ((y.stop - y.start) / self.bias.shape[0])
            total = weighted if total is None else total + weighted
            layers.append(group_layers)
        assert total is not None
        return total.float() if total.dtype != torch.float64 else total, torch.cat(layers)


def _paired_groups(count_y: int, count_x: int, groups: int, what: str) -> list[tuple[slice, slice]]:
    """Group g of the target draws from group g of the source."""
    smaller = min(count_y, count_x)
    if groups > smaller:
        raise InputError(
            f"{what}={groups}: expected at most {smaller}, the smaller of the two models' counts, so that no group is "
            "empty"
        )
    return list(zip(group_slices(count_y, groups, what=what), group_slices(count_x, groups, what=what), strict=True))


class MapProjectionAligner(nn.Module):
    """Structured alignment of keys and of values, maps of their own for each.

    Args:
        student: Its KV shape.
        teacher: Its KV shape.
        settings: Fields of :class:`kvds.settings.AlignmentSettings`, and ``seed``.

    Raises:
        InputError: more groups than layers or heads.
    """

    def __init__(self, student: KVShape, teacher: KVShape, settings: Any) -> None:
        super().__init__()
        self.student_shape, self.teacher_shape, self.settings = student, teacher, settings
        seed = int(getattr(settings, "seed", 0))
        self.parts = nn.ModuleDict(
            {
                name: StructuredPart(student, teacher, settings, seed + i)
                for i, name in enumerate(PARTS[settings.kv_parts])
            }
        )

    def forward(self, student: KVStates, teacher: KVStates, selection: Selection) -> AlignmentLoss:
        """The mean over the selected positions of this micro-batch."""
        return combine(
            {
                name: part(getattr(student, f"{name}s"), getattr(teacher, f"{name}s"), selection.index, selection.mask)
                for name, part in self.parts.items()
            }
        )
