"""Keys and values at chosen positions only: layer after layer is gathered and the rest let go during the forward."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from kvds.kv.capture import KVCapture
from kvds.kv.families import FAMILIES
from kvds.kv.gather import gather_positions
from kvds.kv.states import KVStates


class SelectedCapture:
    """Context manager: after a forward without gradient, ``states`` holds every layer's keys and values at ``index``.

    As soon as a layer's attention has run, its keys and values ``[B, H, T, D]`` are gathered to ``[B, H, M, D]`` and
    freed: at no time are more alive than what is selected and one layer.

    Args:
        backbone: As :class:`kvds.kv.KVCapture`'s model.
        index: ``[B, M]`` int64 positions, ascending and distinct in each row.
        rope: ``"pre"`` or ``"post"``.
    """

    def __init__(self, backbone: nn.Module, index: Tensor, *, rope: str = "pre") -> None:
        config: Any = backbone.config
        family = FAMILIES[config.model_type]
        self._attentions = [getattr(layer, family.attention) for layer in getattr(backbone, family.layers)]
        self._backbone, self._index, self._rope = backbone, index, rope
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> SelectedCapture:
        for layer, attention in enumerate(self._attentions):
            capture = KVCapture(self._backbone, rope=self._rope, layers=[layer])
            own = ExitStack()
            own.enter_context(capture)

            def gather(*_: Any, layer: int = layer, capture: KVCapture = capture, own: ExitStack = own) -> None:
                [keys], [values] = capture.states.keys, capture.states.values
                self._keys[layer] = gather_positions(keys, self._index)
                self._values[layer] = gather_positions(values, self._index)
                own.close()

            # The closures end with their handles, and with them what the capture still holds of this layer.
            handle = attention.register_forward_hook(gather)
            own.callback(handle.remove)
            self._stack.push(own)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        # What has been gathered has left already; a layer that did not run is told of by its capture.
        self._stack.__exit__(exc_type, *rest)  # type: ignore[arg-type]

    @property
    def states(self) -> KVStates:
        """Per layer ``[B, num_key_value_heads, M, head_dim]``, contiguous."""
        layers = range(len(self._attentions))
        return KVStates(tuple(self._keys[i] for i in layers), tuple(self._values[i] for i in layers))
