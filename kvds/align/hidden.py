"""The control: hidden states instead of keys and values, by the flat alignment's own means."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import nn

from kvds.align.flat import FlatAligner, FlatPart
from kvds.align.layer_map import LayerPlan
from kvds.config.settings import AlignmentSettings
from kvds.kv import KVShape, hidden_shape


class HiddenPart(FlatPart):
    """One linear map per target layer from (a mix of) the source's hidden states, as :class:`FlatPart` has it.

    Attributes:
        weight: ``[L_y, hidden_x, hidden_y]``, or ``[hidden_x, hidden_y]`` with ``map_proj_share_dim``.
        bias: ``[L_y, hidden_y]``.
    """

    what: ClassVar[str] = "hidden states"

    def __init__(self, student: KVShape, teacher: KVShape, settings: AlignmentSettings, seed: int) -> None:
        super().__init__(student, teacher, settings, seed)
        if settings.map_proj_share_dim:  # all layers start alike: the first stands for them
            self.weight = nn.Parameter(self.weight.detach()[0].clone())

    @classmethod
    def parameter_count(cls, student: KVShape, teacher: KVShape, settings: AlignmentSettings) -> int:
        """As the flat part's, with one weight where it is shared."""
        count = super().parameter_count(student, teacher, settings)
        layers = LayerPlan.of(student, teacher, settings)
        shared = (layers.targets - 1) * math.prod(cls._widths(student, teacher, settings))
        return count - shared * settings.map_proj_share_dim


class HiddenAligner(FlatAligner):
    """Alignment of what each decoder layer puts out, before the final norm; the arguments of ``KVAligner``.

    With ``hidden_at`` ``"attention"`` of what its attention puts out.

    In all else than what is read it is the flat alignment: layer map, standardisation from the fixed side, starts,
    penalty and means. It answers what of an effect of KV matching comes from keys and values.

    Source: Jiao et al., TinyBERT (2020), section 3.1, hidden states based distillation.
    """

    part_class = HiddenPart

    def __init__(self, student: KVShape, teacher: KVShape, settings: AlignmentSettings, seed: int = 0) -> None:
        super().__init__(student, teacher, settings, seed)
        self.reads = self.teacher_reads = settings.teacher_reads

    @classmethod
    def part_names(cls, settings: AlignmentSettings) -> tuple[str, ...]:
        """One part, the hidden states."""
        return ("hidden_state",)

    @classmethod
    def seen_shape(cls, shape: KVShape) -> KVShape:
        """One head as wide as the model."""
        return hidden_shape(shape)

    @classmethod
    def map_widths(cls, student: KVShape, teacher: KVShape) -> tuple[int, int]:
        """The widths of the models."""
        return student.hidden_size, teacher.hidden_size
