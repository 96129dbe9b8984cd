"""Capture: the context manager that hooks a model and holds what its last forward computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, Self, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvds.kv.families import backbone


class Watched(NamedTuple):
    """One layer's states, for a comparison of gradients.

    Attributes:
        states: ``[B, heads, T, dim]``, a view that only a loss on ``Capture.states`` sends gradients to.
        output: The module's output of which ``states`` is a view.
        heads: From ``output``, or its gradient, to the layout of ``states``.
    """

    states: Tensor
    output: Tensor
    heads: Callable[[Tensor], Tensor]


States_co = TypeVar("States_co", covariant=True)


class Capture(ABC, Generic[States_co]):
    """Context manager: after a forward of ``model`` inside it, ``states`` holds what a subclass reads of every layer.

    Of several forwards the last one counts; a layer that gradient checkpointing recomputes is none. Captures of one
    model nest, and one capture may be entered again.

    Raises:
        RuntimeError: on entering it twice, or on leaving, where ``states`` cannot be read.
    """

    def __init__(self, model: nn.Module) -> None:
        self._backbone: nn.Module = backbone(model)
        self._handles: list[RemovableHandle] = []
        self._states: States_co | None = None

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError(
                f"this {type(self).__name__} is already open: nest another one over the same model instead"
            )
        self._forget()
        # A forward begins at the backbone; a recomputed layer comes without that, and finds its slot taken.
        self._handles.append(self._backbone.register_forward_pre_hook(lambda *_: self._forget()))
        self._handles.extend(self._hook_layers())
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_details: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if exc_type is not None:
            self._forget()
            return
        try:
            _ = self.states
        except BaseException:
            self._forget()
            raise

    @property
    def states(self) -> States_co:
        """What the last forward computed; readable inside the context too, once that forward has run."""
        if self._states is None:
            self._states = self._collect()
        return self._states

    @property
    @abstractmethod
    def watched(self) -> list[Watched]:
        """What the gradient watch looks at, per layer."""

    @abstractmethod
    def _hook_layers(self) -> Iterator[RemovableHandle]:
        """Hang hooks on the layers, which fill slots."""

    @abstractmethod
    def _collect(self) -> States_co:
        """The states of the filled slots."""

    def _forget(self) -> None:
        """Empty the slots."""
        self._states = None
