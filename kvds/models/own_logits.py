"""A model's own logits from hidden states: whatever stands before and behind its head, scales and caps, is the model's.

Cross entropy of a few positions wants the logits of those alone, not of whole rows. A family may divide them (Granite),
cap them (Gemma 2) or scale hidden states first (MiniCPM3): the model's own forward says so, and is run here from hidden
states on, with a backbone that hands these out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvds.errors import InputError, one_line
from kvds.kv.families import backbone
from kvds.kv.module_forward import forward_of

Head = Callable[[Tensor], Tensor]
EVALUATED_LOGITS = 2**27
"""Logits that evaluation makes at once, at most (512 MiB in fp32, twice beside those of the model's dtype)."""
# What two runs of the same operations may differ by, as a part of the norm of the logits.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_CHECKED_TOKENS = 4


class _BackboneOutput:
    """A backbone's output of which nothing but the hidden states is there."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, item: int) -> Tensor:
        return (self.last_hidden_state,)[item]

    def __getattr__(self, name: str) -> None:
        return None


def own_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits ``[n, vocab]`` as ``model`` computes them of the backbone's output ``[n, hidden]``."""
    output = _BackboneOutput(hidden.unsqueeze(0))
    with forward_of(backbone(model), lambda *_, **__: output):
        logits: Tensor = model(inputs_embeds=output.last_hidden_state, use_cache=False).logits
    return logits.squeeze(0)


@torch.no_grad()
def is_plain_head(model: nn.Module) -> bool:
    """Whether the logits of ``model`` are what its head makes of the backbone's output, nothing before and behind it.

    No weight is looked at: they may lie in shards.

    Raises:
        InputError: the model's forward is not backbone, then head.
    """
    device = next(model.parameters()).device
    hidden, logits = torch.zeros(1, 1, device=device), torch.zeros(1, 1, 1, device=device)
    given: list[Tensor] = []

    def stand_in(rows: Tensor) -> Tensor:
        given.append(rows)
        return logits

    try:
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        output = _BackboneOutput(hidden.unsqueeze(0))
        with forward_of(backbone(model), lambda *_, **__: output), forward_of(head, stand_in):
            found = model(inputs_embeds=output.last_hidden_state, use_cache=False).logits
        [rows] = given
    except Exception as error:  # a forward of any family, given what it has not seen
        raise _refusal(model, f"its forward is not a backbone and a head ({one_line(error)})") from error
    same_rows = rows.shape == (1, 1, 1) and rows.untyped_storage()._cdata == hidden.untyped_storage()._cdata
    return found is logits and same_rows and hidden._version == logits._version == 0


def head_of(model: nn.Module, *, plain: bool) -> Head:
    """From hidden states ``[n, hidden]`` to the model's own logits.

    Args:
        model: A causal language model.
        plain: From :func:`is_plain_head`; then it is the head itself.
    """
    if plain:
        head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        return head
    return lambda hidden: own_logits(model, hidden)


@torch.no_grad()
def check_own_logits(model: nn.Module, ids: Tensor) -> Head:
    """The head that :func:`head_of` finds, held against the logits of the model itself on the beginning of a row.

    Args:
        model: Whole, in evaluation mode.
        ids: ``[T]`` token ids on its device.

    Raises:
        InputError: they differ.
    """
    ids = ids[:_CHECKED_TOKENS].unsqueeze(0)
    head = head_of(model, plain=is_plain_head(model))
    expected: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    found = head(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    # A model that overflows here says so by its losses.
    if expected.shape != found.shape or bool(
        (found - expected).norm() > _TOLERANCE.get(next(model.parameters()).dtype, 0.02) * expected.norm()
    ):
        raise _refusal(model, "they differ from those of the model on one row")
    return head


def _refusal(model: nn.Module, reason: str) -> InputError:
    return InputError(
        f"{type(model).__name__}: its logits cannot be made of its hidden states: {reason}; expected a model that "
        "calls its backbone and hands its output on, as most of transformers do"
    )
