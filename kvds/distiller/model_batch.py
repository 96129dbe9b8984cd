"""A token batch of what a model is called with: ids, mask, labels and, where they are known, segments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvds.data.batches import TokenBatch
from kvds.data.encoding import Segment
from kvds.data.labels import IGNORED_LABEL
from kvds.errors import InputError, one_line


def token_batch(inputs: Mapping[str, Any]) -> TokenBatch:
    """The batch that a run's own code computes with, where ``inputs`` are; normalizers of 0 stand for what is to count.

    Without ``segment_ids`` labelled tokens count as the answer and all others as the prompt; without labels all are the
    answer.

    Args:
        inputs: ``input_ids`` ``[B, T]``; ``attention_mask`` ``[B, T]``, 1 = real token (all, where it is missing);
            ``labels`` ``[B, T]``, unshifted, -100 where not counted; ``segment_ids`` ``[B, T]``, see :class:`Segment`.

    Raises:
        InputError: no ids, other shapes, or rows that hold several samples.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise InputError(f"input_ids={one_line(ids)}: expected token ids [batch, tokens], which both models read")
    if inputs.get("position_ids") is not None:
        raise InputError("position_ids: expected rows of one sample each, without them (packing=False)")
    mask, labels, segments = (inputs.get(name) for name in ("attention_mask", "labels", "segment_ids"))
    for name, tensor in (("attention_mask", mask), ("labels", labels), ("segment_ids", segments)):
        if tensor is not None and tensor.shape != ids.shape:
            raise InputError(f"{name}: has shape {list(tensor.shape)}; expected that of input_ids, {list(ids.shape)}")
    mask = torch.ones_like(ids) if mask is None else mask.long()
    if segments is None:
        answer = torch.full_like(ids, Segment.ANSWER)
        segments = answer if labels is None else torch.where(labels != IGNORED_LABEL, answer, int(Segment.PROMPT))
    segments = torch.where(mask.bool(), segments, int(Segment.PAD))
    labels = torch.full_like(ids, IGNORED_LABEL) if labels is None else labels
    sample_ids = torch.arange(len(ids), device=ids.device)
    return TokenBatch(ids, mask, labels, segments, sample_ids, 0.0, 0.0)
