"""The cache map: from a teacher's keys and values of a text to those that its student would have computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvds.errors import InputError
from kvds.handoff.products import map_layers
from kvds.kv import KVShape, KVStates
from kvds.kv.states import KV_PARTS


def source_layers(
    num_student_layers: int, num_teacher_layers: int, count: int | None = None, *, flag: str = "--source_layers"
) -> list[list[int]]:
    """For each student layer the ``count`` consecutive teacher layers around the same relative depth; None: all.

    Raises:
        InputError: more than there are, or none.
    """
    count = num_teacher_layers if count is None else count
    if not 1 <= count <= num_teacher_layers:
        raise InputError(f"{flag} {count}: expected 1 to {num_teacher_layers}, the teacher's layers, or all")
    span, steps = num_teacher_layers - 1, max(1, num_student_layers - 1)
    found = []
    for layer in range(num_student_layers):
        centre = layer * span / steps if num_student_layers > 1 else span
        first = min(max(0, int(centre - (count - 1) / 2 + 0.5)), num_teacher_layers - count)
        found.append(list(range(first, first + count)))
    return found


class CacheMap(nn.Module):
    """``student[i] = Σ_s teacher[sources[i][s]] · weight[i, s] + bias[i]``, heads of a layer side by side.

    One product per student layer, for keys (before the rotary embedding: the student rotates them itself) and for
    values each. Every head of a layer is read by every head.

    Args:
        teacher: The shape of what is mapped.
        student: The shape of what comes out.
        sources: For each student layer the teacher layers that it reads, equally many.

    Attributes:
        key_weight: ``[L_s, S · H_t · D_t, H_s · D_s]``, the S source layers below each other; zeros until it is fitted.
        key_bias: ``[L_s, H_s · D_s]``.
        value_weight: As ``key_weight``.
        value_bias: As ``key_bias``.
    """

    def __init__(self, teacher: KVShape, student: KVShape, sources: Sequence[Sequence[int]]) -> None:
        super().__init__()
        counts = {len(layers) for layers in sources}
        inside = all(0 <= layer < teacher.num_hidden_layers for layers in sources for layer in layers)
        if len(sources) != student.num_hidden_layers or len(counts) != 1 or 0 in counts or not inside:
            raise InputError(
                f"sources={[list(layers) for layers in sources]}: expected equally many of the teacher's "
                f"{teacher.num_hidden_layers} layers for each of the student's {student.num_hidden_layers}"
            )
        self.teacher, self.student = teacher, student
        self.sources = tuple(tuple(layers) for layers in sources)
        self.width = student.num_key_value_heads * student.head_dim
        width = len(self.sources[0]) * teacher.num_key_value_heads * teacher.head_dim
        for part in KV_PARTS:
            weight = torch.zeros(student.num_hidden_layers, width, self.width)
            setattr(self, f"{part[:-1]}_weight", nn.Parameter(weight))
            setattr(self, f"{part[:-1]}_bias", nn.Parameter(torch.zeros(student.num_hidden_layers, self.width)))

    @classmethod
    def identity(cls, shape: KVShape) -> CacheMap:
        """The map of a model to itself, which changes nothing."""
        found = cls(shape, shape, source_layers(shape.num_hidden_layers, shape.num_hidden_layers, 1))
        with torch.no_grad():
            for part in KV_PARTS:
                found.weight(part).copy_(torch.eye(found.width))
        return found

    def weight(self, part: str) -> Tensor:
        """Of ``"keys"`` or ``"values"``."""
        found: Tensor = getattr(self, f"{part[:-1]}_weight")
        return found

    def bias(self, part: str) -> Tensor:
        """Of ``"keys"`` or ``"values"``."""
        found: Tensor = getattr(self, f"{part[:-1]}_bias")
        return found

    @property
    def flops_per_token(self) -> int:
        """Multiplications and additions, keys and values."""
        return 2 * sum(self.weight(part).numel() for part in KV_PARTS)

    def forward(self, states: KVStates, *, impl: str = "auto") -> KVStates:
        """Map keys and values.

        Args:
            states: The teacher's, per layer ``[B, H_t, T, D_t]``; keys before the rotary embedding.
            impl: Of the products, as of :func:`kvds.handoff.products.map_layers`.

        Returns:
            Per student layer ``[B, H_s, T, D_s]`` in the dtype of the states.

        Raises:
            InputError: states of another shape.
        """
        states.check(self.teacher, side="handoff: the teacher")
        heads = self.student.num_key_value_heads
        return KVStates(
            *(
                map_layers(getattr(states, part), self.sources, self.weight(part), self.bias(part), heads, impl=impl)
                for part in KV_PARTS
            )
        )
