"""The part of an aligner for keys or for values: which layers meet, in which units, at what cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from kvds.align.layer_map import LayerPlan, near_diagonal_logits
from kvds.config.settings import AlignmentSettings
from kvds.kv import KVShape

# Of a random start, in standard deviations of the target.
START_GAIN = 1.0


def random_start(width_x: int, width_y: int, seed: int) -> Tensor:
    """``[width_x, width_y]``, semi-orthogonal: a random rotation, cut to shape, times ``START_GAIN``."""
    generator = torch.Generator().manual_seed(seed)
    long, short = max(width_x, width_y), min(width_x, width_y)
    q, r = torch.linalg.qr(torch.randn(long, short, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()  # without it, QR's sign convention would favour some rotations
    # Contiguous: DeepSpeed sends parameters around as bytes.
    return START_GAIN * (q if width_x >= width_y else q.T).float().contiguous()


def compute_dtype(states: Sequence[Tensor]) -> torch.dtype:
    """bf16 states are compared in fp32: the constant offset of keys may be a hundred times what they vary by."""
    return torch.promote_types(torch.float32, states[0].dtype)


def source_and_target(student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> tuple[KVShape, KVShape]:
    """What a map leads from, and to."""
    return (student, teacher) if settings.direction == "student_to_teacher" else (teacher, student)


def gradient_passes(settings: AlignmentSettings) -> tuple[bool, bool]:
    """Whether a map's own numbers get a gradient, and whether its source does (a teacher never)."""
    return settings.aligner_update == "trained", settings.direction == "student_to_teacher"


class AlignerPart(nn.Module, ABC):
    """The maps of keys, or of values, from the layers of ``source`` to those of ``target``.

    Source is the student and target the teacher with direction ``student_to_teacher``, the reverse otherwise. All
    learned parameters work in standardised units,

    ``projected_i = target_scale_i · (map_i(source) / source_scale_i + bias_i) + target_mean_i``,

    so that a learning rate means the same for any pair of models. The buffers are measured once before step 1
    (:mod:`kvds.align.fitting`) and then constant: a statistic of the batch would make the loss depend on how a batch
    is split, and a loss measured in a unit of the trained side falls when that side shrinks. The unit of the loss is
    always the teacher's: of its layer, or (towards the student) of the mix of its layers that the map starts from.

    Attributes:
        pairs: Those of :class:`LayerPlan`.
        layer_blocks: Its blocks; with a hard map the pairs in order, see :meth:`sides`.
        layer_logits: ``[L_y, L_x]`` (``[L_y, widest group]`` with groups); absent with a hard layer map.
        target_mean: ``[L_y, H_y, D_y]`` buffer, per channel; zero towards the student, whose mean the bias holds.
        target_scale: ``[L_y]`` buffer, the unit of the loss.
        source_scale: ``[L_y]`` buffer, standard deviation at the start of what target layer i draws from.
    """

    what: ClassVar[str] = "keys or values"
    # Whether the loss is a distance of the projected states from the target.
    regresses: ClassVar[bool] = True

    target_mean: Tensor
    target_scale: Tensor
    source_scale: Tensor

    bias: nn.Parameter

    def __init__(self, student: KVShape, teacher: KVShape, settings: AlignmentSettings, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.to_teacher = settings.direction == "student_to_teacher"
        self.source_shape, self.target_shape = source_and_target(student, teacher, settings)
        self.loss_name = settings.kv_loss
        plan = LayerPlan.of(student, teacher, settings)
        self.pairs, self.layer_blocks = plan
        targets = plan.targets
        if self.pairs is not None:
            self.register_parameter("layer_logits", None)
        else:
            logits = torch.zeros(plan.logits)
            if not settings.map_proj_init_uniform:
                diagonal = near_diagonal_logits(targets, self.source_shape.num_hidden_layers)
                for y, x in self.layer_blocks:
                    logits[y, : x.stop - x.start] = diagonal[y, x]
            self.layer_logits = nn.Parameter(logits)
        self.num_targets = targets
        shape = self.target_shape
        self.register_buffer("target_mean", torch.zeros(targets, shape.num_key_value_heads, shape.head_dim))
        self.register_buffer("target_scale", torch.ones(targets))
        self.register_buffer("source_scale", torch.ones(targets))

    @classmethod
    @abstractmethod
    def parameter_count(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> int:
        """Numbers that are learned, of the part that the same arguments would build."""

    @classmethod
    @abstractmethod
    def flops_per_position(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings, slots: int) -> float:
        """Of matrix products, forward and backward, for each position compared; a multiply and an add are two.

        What a micro-batch costs once, whatever its size, is left out.

        Args:
            student: As seen, see :meth:`kvds.align.KVAligner.seen_shape`.
            teacher: As seen.
            settings: With ``layer_map`` and ``kv_parts`` as :func:`kvds.align.aligner_settings` has them.
            slots: Positions compared in each row.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AlignerPart:
        # A mean in bf16 would be off by more than what keys vary by: the statistics stay fp32 under .bfloat16().
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = old.to(new.device)
        return self

    def sides(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """``source`` and ``target``, with a hard map only the layers that meet, in the order of the pairs."""
        if self.pairs is not None:
            student = tuple(student[i] for i, _ in self.pairs)
            teacher = tuple(teacher[i] for _, i in self.pairs)
        return (student, teacher) if self.to_teacher else (teacher, student)

    def block_weights(self, y: slice, x: slice) -> Tensor:
        """``[targets, sources]`` softmax weights of one of ``layer_blocks`` of a learned layer map."""
        logits = self.layer_logits[y, : x.stop - x.start]
        return logits.to(torch.promote_types(torch.float32, logits.dtype)).softmax(1)

    def layer_mix(self) -> Tensor:
        """``[L_y, L_x]`` weights over all layers of the source, rows summing to 1, zero outside a row's group."""
        mix = self.source_scale.new_zeros(self.num_targets, self.source_shape.num_hidden_layers)
        if self.pairs is not None:
            for i, pair in enumerate(self.pairs):
                mix[i, pair[0 if self.to_teacher else 1]] = 1.0
            return mix
        for y, x in self.layer_blocks:
            mix[y, x] = self.block_weights(y, x).to(mix.dtype)
        return mix

    def set_layer_mix(self, mix: Tensor) -> None:
        """Start a learned layer map from ``mix``, ``[L_y, L_x]`` positive weights within each row's group."""
        for y, x in self.layer_blocks:
            self.layer_logits[y, : x.stop - x.start] = mix[y, x].log().to(self.layer_logits)

    def mixed_layers(self, rows: Tensor) -> Tensor:
        """``[layers of source after sides(), …]`` → ``[L_y, …]`` by the layer mix as it is now."""
        if self.pairs is not None:
            return rows
        return (self.layer_mix().to(rows.dtype) @ rows.flatten(1)).unflatten(1, rows.shape[1:])

    @property
    @abstractmethod
    def projection(self) -> nn.Parameter | None:
        """The dimension maps, ``[D_x, D_y]`` or ``[L_y, …, D_x, D_y]``; None where nothing is mapped."""

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """Dimension maps per target layer, and the dimensions on either side of one."""
        assert self.projection is not None
        width_x, width_y = self.projection.shape[-2:]
        return self.bias.numel() // (self.num_targets * width_y), width_x, width_y

    def set_offset(self, mean_x: Tensor, mean_y: Tensor) -> None:
        """Take out the means: set the bias so that the residual starts with mean zero, whatever the maps are now.

        Args:
            mean_x: ``[L_y, maps, D_x]`` of what the maps are applied to.
            mean_y: ``[L_y, maps, D_y]`` of what they should give.
        """
        assert self.projection is not None
        source_unit, target_unit = (s.double()[:, None, None] for s in (self.source_scale, self.target_scale))
        projection = self.projection.double()
        if projection.dim() == 3:  # one map per layer
            projection = projection.unsqueeze(1)
        offset = self.target_mean.double().reshape(mean_y.shape)
        bias = (mean_y - offset) / target_unit - ((mean_x / source_unit).unsqueeze(-2) @ projection).squeeze(-2)
        self.bias.copy_(bias.reshape(self.bias.shape))

    def layer_rows(self, rows: Tensor) -> Tensor:
        """As :meth:`source_rows`, before layers are mixed: ``[layers, N, H_x, D_x]`` → ``[layers, maps, N, width]``.

        Heads are mixed as for the first target layer.
        """
        return rows.flatten(2).unsqueeze(1)

    @abstractmethod
    def source_rows(self, rows: Tensor) -> Tensor:
        """What the dimension maps are applied to: ``[layers, N, H_x, D_x]`` → ``[L_y, maps per layer, N, width]``."""

    @abstractmethod
    def target_rows(self, rows: Tensor) -> Tensor:
        """What the dimension maps should give: ``[L_y, N, H_y, D_y]`` → ``[L_y, maps per layer, N, width]``."""

    def projected(self, rows: Tensor) -> Tensor:
        """What the maps make of the source, in the target's own unit: ``[L_y, N, H_y, D_y]``.

        Args:
            rows: ``[layers, N, H_x, D_x]`` of the source as :meth:`sides` gives it.
        """
        assert self.projection is not None
        projection = self.projection.to(rows.dtype)
        if projection.dim() == 3:  # one map per layer
            projection = projection.unsqueeze(1)
        source_unit, target_unit = (
            s.to(rows.dtype)[:, None, None, None] for s in (self.source_scale, self.target_scale)
        )
        bias, mean = (
            part.to(rows.dtype).reshape(self.num_targets, self.map_shape[0], 1, -1)
            for part in (self.bias, self.target_mean)
        )
        found = target_unit * (self.source_rows(rows) / source_unit @ projection + bias) + mean
        shape = self.target_shape
        return found.transpose(1, 2).flatten(2).unflatten(2, (shape.num_key_value_heads, shape.head_dim))

    @abstractmethod
    def forward(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], index: Tensor | None, mask: Tensor,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Loss (scalar with a graph) and detached losses ``[L_y]`` of one part.

        Args:
            student: Per layer ``[B, H, T, D]``.
            teacher: Per layer ``[B, H, T, D]``.
            index: ``[B, M]`` int64 positions; None = every position.
            mask: ``[B, M]`` bool, True = counts.
            weight: ``[B, M]``, how much each counts; None = all alike, always so where the mode ``weighs`` nothing.
        """
