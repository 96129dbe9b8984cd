"""A batch as handoff reads it: prompts of which all but the last token lie in a cache, and what comes after.

Prompts of different lengths end at the same place: padding stands before them in the cache, and behind what follows.

    cache   ┄ ┄ p p p p        continuation   p r r r a a ┄
            p p p p p p                       p r r a ┄ ┄ ┄
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvds.data.batches import TokenBatch
from kvds.data.encoding import EncodedSample, Segment
from kvds.data.labels import IGNORED_LABEL, LabelledPositions
from kvds.handoff.reading import cache_argument, fill_cache, positions_of, without_padding
from kvds.kv import KVStates, gather_positions
from kvds.kv.families import backbone, layer_kinds, window_of


def first_prompt_length(sample: EncodedSample) -> int:
    """Tokens before the first that is answered; of a conversation those of its first turn."""
    segments = sample.segment_ids
    return next((i for i, segment in enumerate(segments) if segment != Segment.PROMPT), len(segments))


@dataclass(frozen=True)
class Continuation:
    """Where the tokens of a padded batch ``[B, T]`` go. P and C may be known to the host alone: nothing waits for it.

    Attributes:
        prompt_index: ``[B, P]`` int64 position in the row of each slot of the cache; any where there is none.
        prompt_mask: ``[B, P]`` bool, slots that hold a token.
        index: ``[B, C]`` int64 position in the row of each token that follows.
        mask: ``[B, C]`` bool, those that are there.
        labelled: Of the ``[B, C]`` tokens, where the next one counts.
    """

    prompt_index: Tensor
    prompt_mask: Tensor
    index: Tensor
    mask: Tensor
    labelled: LabelledPositions

    @classmethod
    def from_batch(cls, batch: TokenBatch) -> Continuation:
        """Of a batch on the CPU, a row a sample, padded on the right.

        The cache has a slot even where no prompt has two tokens: it is masked.
        """
        rows, tokens = batch.input_ids.shape
        lengths = (batch.segment_ids != Segment.PAD).sum(1, keepdim=True)
        # Of a conversation the cache holds the first turn: later ones follow it, as what is answered between them does.
        first = (batch.segment_ids == Segment.PROMPT).long().cumprod(1)
        before = (first.sum(1, keepdim=True) - 1).clamp_min(0)  # [B, 1]
        slots = max(1, int(before.max()))
        follow = max(1, int((lengths - before).max()))
        prompt_index = torch.arange(slots) - (slots - before)
        index = before + torch.arange(follow)
        mask = index < lengths
        clamped = index.clamp_max(tokens - 1)
        labels = batch.labels.gather(1, clamped).masked_fill(~mask, IGNORED_LABEL)
        # A row of padding keeps one token, which sees itself: an attention row without a key is not finite.
        mask[:, 0] = True
        return cls(prompt_index.clamp_min(0), prompt_index >= 0, clamped, mask, LabelledPositions.from_labels(labels))

    def to(self, device: torch.device) -> Continuation:
        """The same with its tensors on ``device``."""
        names = ("prompt_index", "prompt_mask", "index", "mask")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, labelled=self.labelled.to(device), **moved)

    def prompt_states(self, states: KVStates) -> KVStates:
        """Of states of all tokens ``[B, H, T, D]`` those of the cache's slots, ``[B, H, P, D]``, zero where none is."""
        picked = KVStates(*(tuple(gather_positions(layer, self.prompt_index) for layer in part) for part in states))
        return without_padding(picked, self.prompt_mask)


def continue_from(
    student: nn.Module, states: KVStates, row: Continuation, input_ids: Tensor, *, seen: Tensor | None = None
) -> Tensor:
    """The backbone's output ``[B, C, hidden]`` on the tokens that follow, over a cache of ``states``.

    Args:
        student: A causal language model; gradients reach its weights, and ``states``.
        states: Keys before the rotary embedding and values of the cache's slots.
        row: Of the batch.
        input_ids: ``[B, T]`` of the batch.
        seen: ``[B, P]`` bool, slots that attention may see; None: those that hold a token.
    """
    body: Any = backbone(student)
    before = row.prompt_mask if seen is None else seen
    real = torch.cat([before, row.mask], 1)
    follow = row.index.shape[1]
    masks = {
        kind: _attention_mask(body, real, follow, window_of(body.config, kind)) for kind in layer_kinds(body.config)
    }
    # Whole layers, also of a student with a window: what is seen is told by the mask.
    inputs: dict[str, Any] = {cache_argument(student): fill_cache(student, states, before, windowed=False)}
    output = body(
        input_ids=input_ids.gather(1, row.index), position_ids=positions_of(real)[:, before.shape[1] :],
        attention_mask=masks if len(masks) > 1 else next(iter(masks.values())), use_cache=True, **inputs,
    )  # fmt: skip
    hidden: Tensor = output.last_hidden_state
    return hidden


def _attention_mask(body: Any, real: Tensor, follow: int, window: int | None) -> Tensor:
    """``[B, 1, C, P + C]`` which slots each of the last C sees.

    Transformers takes it as it is, where it would look at a mask of two dimensions on the host.
    """
    slots = torch.arange(real.shape[1], device=real.device)
    distance = slots[-follow:, None] - slots
    near = distance >= 0
    if window is not None:
        near = near & (distance < window)
    # A token that is padding sees itself: an attention row without a key is not finite, and would spoil the others.
    sees = (near & real[:, None, :] | (distance == 0)).unsqueeze(1)
    if body.config._attn_implementation != "eager":
        return sees
    dtype = next(body.parameters()).dtype
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=real.device)
    return torch.where(sees, hidden.new_zeros(()), hidden)
