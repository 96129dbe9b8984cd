"""Keys and values at chosen positions only: layer after layer is gathered and the rest let go during the forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kvds.kv.capture import KVCapture
from kvds.kv.families import attention_layouts
from kvds.kv.gather import gather_positions
from kvds.kv.layer_captures import LayerCaptures
from kvds.kv.states import KV_PARTS, KVStates


class SelectedCapture(LayerCaptures):
    """Context manager: after a forward without gradient, ``states`` holds every layer's keys and values at ``index``.

    As soon as a layer's attention has run, its keys and values ``[B, H, T, D]`` are gathered to ``[B, H, M, D]`` and
    freed: at no time are more alive than what is selected and one layer. A part that is not asked for is not kept.

    Args:
        backbone: As :class:`kvds.kv.KVCapture`'s model.
        index: ``[B, M]`` int64 positions, ascending and distinct in each row; None = all, as views where nothing else
            lies in the same memory.
        rope: ``"pre"`` or ``"post"``.
        parts: ``keys``, ``values`` or both.
        deliver: What becomes of a layer's gathered keys, and of its values; nothing is kept where it returns None.
    """

    def __init__(
        self,
        backbone: nn.Module,
        index: Tensor | None,
        *,
        rope: str = "pre",
        parts: Sequence[str] = KV_PARTS,
        deliver: Callable[[Tensor], Tensor | None] = lambda gathered: gathered,
    ) -> None:
        super().__init__(backbone, rope=rope, parts=tuple(parts))
        attention_layouts(backbone)  # refuses what one layer alone does not show: a projection that serves two
        self._index, self._deliver = index, deliver
        self._kept: dict[str, list[Tensor | None]] = {part: [] for part in parts}

    def take(self, capture: KVCapture) -> None:
        """As of :class:`kvds.kv.layer_captures.LayerCaptures`."""
        for part, kept in self._kept.items():
            [states] = getattr(capture.states, part)
            kept.append(self._deliver(_alone(gather_positions(states, self._index))))

    @property
    def states(self) -> KVStates:
        """Per layer ``[B, num_key_value_heads, M, head_dim]``; no layers of a part that was not asked for.

        Raises:
            RuntimeError: they were delivered elsewhere.
        """
        found = {part: tuple(layer for layer in kept if layer is not None) for part, kept in self._kept.items()}
        if any(len(layers) != len(self._attentions) for layers in found.values()):
            raise RuntimeError("these keys and values have been delivered elsewhere")
        return KVStates(found.get("keys", ()), found.get("values", ()))


def _alone(states: Tensor) -> Tensor:
    """``states`` in memory of their own: one projection may hold queries, keys and values, and all would stay."""
    shared = states.untyped_storage().nbytes() > states.numel() * states.element_size()
    return states.clone(memory_format=torch.contiguous_format) if shared else states
