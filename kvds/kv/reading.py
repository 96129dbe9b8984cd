"""What of a model an alignment reads: keys and values, or hidden states."""

from __future__ import annotations

from typing import Any

from torch import nn

from kvds.kv.capture import KVCapture
from kvds.kv.hidden import HiddenCapture, HiddenStates
from kvds.kv.states import KVStates

States = KVStates | HiddenStates
Capture = KVCapture | HiddenCapture


def open_capture(model: nn.Module, reads: str, *, rope: str = "pre", require_grad: bool = False) -> Capture:
    """A context manager whose ``states`` hold, after a forward of ``model`` inside it, what ``reads`` names.

    Args:
        model: A causal language model or its backbone.
        reads: ``"kv"`` or ``"hidden"``, as an aligner's ``reads`` says.
        rope: ``"pre"`` or ``"post"``, of keys.
        require_grad: Raise where a captured tensor has no graph.
    """
    options: dict[str, Any] = {"require_grad": require_grad}
    return HiddenCapture(model, **options) if reads == "hidden" else KVCapture(model, rope=rope, **options)
