"""The structured alignment: a layer map, a head map and a dimension map, kept apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kvds.align.aligner import KVAligner
from kvds.align.aligner_part import AlignerPart, compute_dtype, gradient_passes, random_start, source_and_target
from kvds.align.layer_map import LayerPlan, near_diagonal_logits
from kvds.config.settings import AlignmentSettings
from kvds.kv import KVShape, group_slices
from kvds.kv.gather import rows_to_read
from kvds.ops import map_projection_loss
from kvds.ops.mixing import mixing_products


class MapProjectionPart(AlignerPart):
    """``map_i(source)_j = Σ_l softmax(layer_logits)[i,l] Σ_h head_mix[(i,)j,h] · source[l]_h @ dim_proj[(i,j)]``.

    Attributes:
        head_mix: ``[L_y, H_y, H_x / head_groups]``, or ``[H_y, H_x / head_groups]`` where dimension maps are shared: a
            head draws from the source heads of its own group.
        dim_proj: ``[L_y, H_y, D_x, D_y]``, or ``[D_x, D_y]`` where shared.
        bias: ``[L_y, H_y, D_y]``.
    """

    def __init__(self, student: KVShape, teacher: KVShape, settings: AlignmentSettings, seed: int) -> None:
        super().__init__(student, teacher, settings, seed)
        self.impl = settings.impl
        heads_x, heads_y = self.source_shape.num_key_value_heads, self.target_shape.num_key_value_heads
        groups = settings.head_groups
        self.head_blocks = list(zip(group_slices(heads_y, groups), group_slices(heads_x, groups), strict=True))
        uniform = settings.map_proj_init_uniform
        logits = torch.zeros(heads_y, heads_x) if uniform else near_diagonal_logits(heads_y, heads_x)
        head_mix = torch.cat([logits[y, x].softmax(1) for y, x in self.head_blocks])  # [H_y, H_x / groups]
        projection = random_start(self.source_shape.head_dim, self.target_shape.head_dim, seed)
        per_map = () if settings.map_proj_share_dim else (self.num_targets, heads_y)
        self.head_mix = nn.Parameter(head_mix.expand(*per_map[:1], *head_mix.shape).clone())
        self.dim_proj = nn.Parameter(projection.expand(*per_map, *projection.shape).clone())
        self.bias = nn.Parameter(torch.zeros_like(self.target_mean))

    @classmethod
    def parameter_count(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> int:
        """Head mixes, dimension maps, bias and layer logits."""
        layers = LayerPlan.of(student, teacher, settings)
        source, target = source_and_target(student, teacher, settings)
        heads_x, heads_y = source.num_key_value_heads, target.num_key_value_heads
        shared = settings.map_proj_share_dim
        mixes = (1 if shared else layers.targets) * heads_y * (heads_x // settings.head_groups)
        maps = (1 if shared else layers.targets * heads_y) * source.head_dim * target.head_dim
        return math.prod(layers.logits) + mixes + maps + layers.targets * heads_y * target.head_dim

    @classmethod
    def flops_per_position(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings, slots: int) -> float:
        """Mixing and projection, as the lean implementation does them; block by block of layers and heads."""
        layers = LayerPlan.of(student, teacher, settings)
        source, target = source_and_target(student, teacher, settings)
        groups = settings.head_groups
        heads = source.num_key_value_heads // groups, target.num_key_value_heads // groups
        learns, moves = gradient_passes(settings)
        project = layers.targets * target.num_key_value_heads * target.head_dim * (1 + learns + (moves or learns))
        mix = sum(
            mixing_products((x.stop - x.start, y.stop - y.start), heads, layers.pairs is not None, learns, moves)
            for y, x in layers.blocks
        )
        return 2.0 * source.head_dim * (project + groups * mix)

    @property
    def projection(self) -> nn.Parameter:
        """``dim_proj``."""
        return self.dim_proj

    def head_weights(self) -> Tensor:
        """``[L_y, H_y, H_x]``, zero outside a head's group."""
        mix = self.head_mix.expand(self.num_targets, *self.head_mix.shape[-2:])
        whole = mix.new_zeros(*mix.shape[:2], self.source_shape.num_key_value_heads)
        for y, x in self.head_blocks:
            whole[:, y, x] = mix[:, y]
        return whole

    def layer_rows(self, rows: Tensor) -> Tensor:
        """``[layers, N, H_x, D_x]`` → ``[layers, H_y, N, D_x]``, heads mixed as for the first target layer."""
        return torch.einsum("jh,lnhd->ljnd", self.head_weights()[0].to(rows.dtype), rows)

    def source_rows(self, rows: Tensor) -> Tensor:
        """``[layers, N, H_x, D_x]`` → ``[L_y, H_y, N, D_x]``."""
        return torch.einsum("ijh,inhd->ijnd", self.head_weights().to(rows.dtype), self.mixed_layers(rows))

    def target_rows(self, rows: Tensor) -> Tensor:
        """``[L_y, N, H_y, D_y]`` → ``[L_y, H_y, N, D_y]``."""
        return rows.transpose(1, 2)

    def forward(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], index: Tensor | None, mask: Tensor,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One operation per block of layers and heads; see :meth:`AlignerPart.forward`."""
        source, target = self.sides(student, teacher)
        dtype = compute_dtype(source)
        if self.impl == "reference":  # the others widen bf16 states themselves, without a copy of them
            source, target = tuple(x.to(dtype) for x in source), tuple(y.to(dtype) for y in target)
        scale = self.target_scale.to(dtype)
        gain = scale / self.source_scale
        head_mix, dim_proj = self.head_mix.to(dtype), self.dim_proj.to(dtype)
        bias = self.target_mean + scale[:, None, None] * self.bias.to(dtype)
        total, layers = bias.new_zeros(()), []
        for y, x in self.layer_blocks:
            # A hard map is passed sparse, one source layer for each target layer, and pays for no mixing.
            layer_mix = gain[y] if self.pairs is not None else gain[y, None] * self.block_weights(y, x).to(dtype)
            block_layers: list[Tensor] = []
            for j, h in self.head_blocks:
                whole = len(self.head_blocks) == 1
                loss, per_layer = map_projection_loss(
                    source[x] if whole else tuple(s[:, h] for s in source[x]),
                    target[y] if whole else tuple(t[:, j] for t in target[y]),
                    layer_mix,
                    head_mix[j] if head_mix.dim() == 2 else head_mix[y, j],
                    dim_proj if dim_proj.dim() == 2 else dim_proj[y, j],
                    bias=bias[y, j],
                    source_index=rows_to_read(source[0], index),
                    target_index=rows_to_read(target[0], index),
                    mask=mask,
                    scale=scale[y],
                    weight=weight,
                    loss=self.loss_name,
                    impl=self.impl,
                )
                # Head groups are of one size, layer groups may differ by a layer.
                total = total + loss * ((y.stop - y.start) / (self.num_targets * len(self.head_blocks)))
                block_layers.append(per_layer)
            layers.append(torch.stack(block_layers).mean(0))
        return total, torch.cat(layers)


class MapProjectionAligner(KVAligner):
    """Structured alignment: the map of :class:`MapProjectionPart`, the arguments of :class:`KVAligner`."""

    part_class = MapProjectionPart
