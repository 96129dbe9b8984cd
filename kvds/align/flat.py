"""The flat alignment, the baseline: heads flattened, one linear map per layer for keys and one for values."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kvds.align.aligner import KVAligner
from kvds.align.aligner_part import AlignerPart, compute_dtype, gradient_passes, random_start, source_and_target
from kvds.align.layer_map import LayerPlan, nearest_layers
from kvds.config.settings import AlignmentSettings
from kvds.errors import InputError
from kvds.kv import KVShape, gather_positions
from kvds.ops.reference import penalty


class FlatPart(AlignerPart):
    """``map_i(source) = (Σ_l softmax(layer_logits)[i,l] · x_l) @ weight_i`` over flattened heads ``x``.

    A hard layer map names one ``l`` for each ``i``; with ``source_layers_per_target`` K above 1 ``x`` are the heads of
    the K layers nearest to it side by side, and a map of its own leads from each.

    Attributes:
        weight: ``[L_y, K·H_x·D_x, H_y·D_y]``.
        bias: ``[L_y, H_y·D_y]``.
    """

    def __init__(self, student: KVShape, teacher: KVShape, settings: AlignmentSettings, seed: int) -> None:
        super().__init__(student, teacher, settings, seed)
        self.sources = settings.source_layers_per_target
        width_x, width_y = self._widths(student, teacher, settings)
        start = random_start(width_x, width_y, seed)
        self.weight = nn.Parameter(start.expand(self.num_targets, width_x, width_y).clone())
        self.bias = nn.Parameter(torch.zeros(self.num_targets, width_y))

    @classmethod
    def parameter_count(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> int:
        """Weight, bias and layer logits."""
        layers, (width_x, width_y) = LayerPlan.of(student, teacher, settings), cls._widths(student, teacher, settings)
        return math.prod(layers.logits) + layers.targets * (width_x + 1) * width_y

    @classmethod
    def flops_per_position(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings, slots: int) -> float:
        """One product per target layer, and the mix of source layers."""
        layers, (width_x, width_y) = LayerPlan.of(student, teacher, settings), cls._widths(student, teacher, settings)
        learns, moves = gradient_passes(settings)
        # Under learned logits the mixed rows get a gradient, also where their source gets none.
        project = 1 + learns + (moves or (learns and layers.mixed > 0))
        mix = 1 + learns + moves
        return 2.0 * (layers.targets * width_x * width_y * project + layers.mixed * width_x * mix)

    @staticmethod
    def _widths(student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> tuple[int, int]:
        source, target = source_and_target(student, teacher, settings)
        width_x = settings.source_layers_per_target * source.num_key_value_heads * source.head_dim
        return width_x, target.num_key_value_heads * target.head_dim

    def sides(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """As :meth:`AlignerPart.sides`, the K source layers of each pair after each other."""
        source, target = super().sides(student, teacher)
        if self.sources == 1:
            return source, target
        assert self.pairs is not None  # rules keep several layers from a learned map
        layers, side = (student, 0) if self.to_teacher else (teacher, 1)
        drawn = (nearest_layers(pair[side], self.sources, len(layers)) for pair in self.pairs)
        return tuple(layers[i] for several in drawn for i in several), target

    @property
    def projection(self) -> nn.Parameter:
        """``weight``."""
        return self.weight

    def source_rows(self, rows: Tensor) -> Tensor:
        """``[layers, N, H_x, D_x]`` → ``[L_y, 1, N, K·H_x·D_x]``."""
        flat = self.mixed_layers(rows).flatten(2)
        return flat.unflatten(0, (self.num_targets, -1)).transpose(1, 2).flatten(2).unsqueeze(1)

    def target_rows(self, rows: Tensor) -> Tensor:
        """``[L_y, N, H_y, D_y]`` → ``[L_y, 1, N, H_y·D_y]``."""
        return rows.flatten(2).unsqueeze(1)

    def forward(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], index: Tensor | None, mask: Tensor,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One matrix product per target layer on the selected positions; see :meth:`AlignerPart.forward`."""
        source, target = self.sides(student, teacher)
        dtype = compute_dtype(source)

        def selected(layer: Tensor) -> Tensor:
            # [B, M, H·D], without an index a view of what a projection put out. Filled, not multiplied with the mask:
            # what lies under it may be anything, also NaN.
            rows = gather_positions(layer, index).transpose(1, 2).flatten(2)
            return torch.where(mask[..., None], rows.to(dtype), rows.new_zeros((), dtype=dtype))

        read = {id(layer): layer for layer in source}  # neighbours share layers
        once = {key: selected(layer) for key, layer in read.items()}
        rows = [once[id(layer)] for layer in source]
        if self.sources > 1:
            rows = [torch.cat(rows[i : i + self.sources], -1) for i in range(0, len(rows), self.sources)]
        if self.layer_logits is not None:
            [(y, x)] = self.layer_blocks
            stacked = torch.stack(rows)
            mixed = (self.block_weights(y, x).to(dtype) @ stacked.flatten(1)).view(-1, *stacked.shape[1:])
            rows = list(mixed.unbind(0))
        scale, mean = self.target_scale.to(dtype), self.target_mean.flatten(1).to(dtype)
        maps = self.weight.to(dtype) / self.source_scale[:, None, None].to(dtype)
        bias = self.bias.to(dtype)
        count = (mask.sum() * maps.shape[2]).clamp_min(1)
        losses = []
        for i, layer in enumerate(target):
            wanted = (selected(layer) - mean[i]) / scale[i]
            elements = penalty(rows[i] @ maps[i] + bias[i] - wanted, self.loss_name)
            if weight is not None:
                elements = elements * weight[..., None].to(dtype)
            losses.append(torch.where(mask[..., None], elements, elements.new_zeros(())).sum() / count)
        per_layer = torch.stack(losses)
        return per_layer.mean(), per_layer.detach()


class FlatAligner(KVAligner):
    """Flat alignment: the map of :class:`FlatPart`, the arguments of :class:`KVAligner`."""

    part_class = FlatPart

    @classmethod
    def _check(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> None:
        super()._check(student, teacher, settings)
        source, _ = source_and_target(student, teacher, settings)
        if settings.source_layers_per_target > source.num_hidden_layers:
            raise InputError(
                f"source_layers_per_target={settings.source_layers_per_target}: expected at most "
                f"{source.num_hidden_layers}, the layers of the model that is mapped from"
            )

    @classmethod
    def map_widths(cls, student: KVShape, teacher: KVShape) -> tuple[int, int]:
        """All heads of a layer together."""
        return student.num_key_value_heads * student.head_dim, teacher.num_key_value_heads * teacher.head_dim
