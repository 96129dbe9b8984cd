"""Buffers of a placed model: whatever an engine does to parameters, what a model computes with stays as it was made.

A rotary embedding keeps its frequencies in fp32 in a bf16 model, too: rounded, they turn keys at position 512 by angles
that are off by radians. DeepSpeed's training engine casts parameters alone; its inference engine casts the module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Within it an engine is built around ``model`` or a part of it; afterwards each buffer has the dtype and the
    values that it had, on the device where the engine left it.

    Args:
        model: Its modules keep their names; modules that hold buffers are not replaced.
    """
    before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    yield
    for name, buffer in before.items():
        placed = model.get_buffer(name)
        placed.data = buffer.to(placed.device)
