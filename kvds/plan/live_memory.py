"""Bytes of tensors alive while code runs on fake tensors: shapes without data, so that any model can be planned."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# torch's CPU and CUDA allocators hand out whole blocks.
_BLOCK = {"cpu": 64, "cuda": 512}


class LiveMemory(TorchDispatchMode):
    """Counts the storages of operators' results until they are freed, those of :meth:`ignore` left out.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes alive at once so far.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self._block = _BLOCK.get(device_type, 512)
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.live = 0
        self.peak = 0

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Storages that count elsewhere, such as those of parameters and inputs: a view of one would count it."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and count what it made."""
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = -(-storage.nbytes() // self._block) * self._block
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.live -= size

    @contextlib.contextmanager
    def peak_of(self) -> Iterator[list[int]]:
        """The peak of what runs inside, as the one entry of the list that it yields."""
        before, self.peak = self.peak, self.live
        found: list[int] = []
        try:
            yield found
        finally:
            found.append(self.peak)
            self.peak = max(before, self.peak)


class HostCopies:
    """What autograd saves, as if it went to host memory: there it counts in ``bytes``, and as new memory of the device
    each time that it is read again.

    Attributes:
        bytes: Saved so far.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context within which it takes the place of ``torch.autograd.graph.save_on_cpu``."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor.shape, tensor.stride(), tensor.dtype

    @staticmethod
    def _unpack(kept: tuple[torch.Size, tuple[int, ...], torch.dtype]) -> Tensor:
        shape, stride, dtype = kept
        return torch.empty_strided(shape, stride, dtype=dtype)


def drop_gradients(parameters: Iterator[torch.nn.Parameter]) -> None:
    """Free each gradient as soon as it is whole, as ZeRO does once it is in its bucket."""

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(free)
