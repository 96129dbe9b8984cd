"""Layer after layer of one forward: what each computed is handed over and let go before the next one runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from torch import nn

from kvds.kv.capture import KVCapture
from kvds.kv.families import attention_modules


class LayerCaptures(ABC):
    """Context manager of a forward without gradient that hands over each layer's capture once its attention has run.

    At no time is more alive than one layer and what :meth:`take` keeps. A layer that did not run is told of by its
    capture.

    Args:
        backbone: As :class:`kvds.kv.KVCapture`'s model.
        **captured: As of :class:`kvds.kv.KVCapture`, all but the layers.
    """

    def __init__(self, backbone: nn.Module, **captured: Any) -> None:
        self._backbone, self._captured = backbone, captured
        self._attentions = attention_modules(backbone)
        self._stack = ExitStack()

    @abstractmethod
    def take(self, capture: KVCapture) -> None:
        """Use the capture of the layer that has just run."""

    def __enter__(self) -> Self:
        for layer, attention in enumerate(self._attentions):
            capture = KVCapture(self._backbone, layers=[layer], **self._captured)
            own = ExitStack()
            own.enter_context(capture)

            def hand_over(*_: Any, capture: KVCapture = capture, own: ExitStack = own) -> None:
                self.take(capture)
                own.close()

            # The closures end with their handles, and with them what the capture still holds of this layer.
            handle = attention.register_forward_hook(hand_over)
            own.callback(handle.remove)
            self._stack.push(own)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
