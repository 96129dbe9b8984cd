"""Readings: what of a model an alignment reads, be it keys and values, these with queries, or hidden states."""

from __future__ import annotations

from torch import nn

from kvds.kv.capture import KVCapture
from kvds.kv.forward_capture import Capture
from kvds.kv.hidden import HiddenCapture, HiddenStates
from kvds.kv.queries import AttentionCapture, AttentionStates
from kvds.kv.states import KVStates

States = KVStates | HiddenStates | AttentionStates


def open_capture(model: nn.Module, reads: str, *, rope: str = "pre", require_grad: bool = False) -> Capture[States]:
    """A context manager whose ``states`` hold, after a forward of ``model`` inside it, what ``reads`` names.

    Args:
        model: A causal language model or its backbone.
        reads: As an aligner's ``reads`` says: ``"kv"``, ``"attention"`` (queries, too), ``"hidden"`` or
            ``"attention_output"``.
        rope: ``"pre"`` or ``"post"``, of keys.
        require_grad: Raise where a captured tensor has no graph.
    """
    if reads in ("hidden", "attention_output"):
        at = "layer" if reads == "hidden" else "attention"
        return HiddenCapture(model, require_grad=require_grad, at=at)
    return (AttentionCapture if reads == "attention" else KVCapture)(model, rope=rope, require_grad=require_grad)
