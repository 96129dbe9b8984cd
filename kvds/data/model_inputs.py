"""Model inputs: what a backbone is called with on a batch, packed or not, and the way back to packed rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvds.data.batches import TokenBatch
from kvds.kv.families import layer_kinds, window_of
from kvds.kv.packed import packed_selection
from kvds.kv.row_attention import ROW_ATTENTION, bounds_as_mask
from kvds.kv.select import Selection


def model_inputs(batch: TokenBatch, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What a backbone is called with for ``batch``.

    Where padding stands behind the samples, attention gets no mask: it is causal, so that no real token sees padding.

    Args:
        batch: On the model's device.
        config: The model's, for its attention.
        dtype: The model's.
    """
    packing = batch.packing
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    by_bounds = config._attn_implementation == ROW_ATTENTION
    if packing is None:
        mask: Tensor | None = batch.attention_mask
        if batch.pads_right:
            mask = bounds_as_mask(None, batch.input_ids.device) if by_bounds else None
        return inputs | {"attention_mask": mask}
    inputs["position_ids"] = packing.position_ids
    if by_bounds:
        mask = bounds_as_mask(packing.bounds, batch.input_ids.device)
        return inputs | {"attention_mask": mask, "max_length_q": packing.longest}
    masks = {
        kind: packing.attention_mask(config._attn_implementation, dtype, window_of(config, kind))
        for kind in layer_kinds(config)
    }
    # A model of several kinds of layers takes a mask for each; one of one kind might take no mapping.
    return inputs | {"attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}


def unpacked(batch: TokenBatch) -> TokenBatch:
    """The same samples, a row each, padded on the right; ``batch`` itself where it is not packed. No host sync."""
    packing = batch.packing
    if packing is None:
        return batch

    absent = ~packing.token_mask

    def rows(tensor: Tensor, padding: int) -> Tensor:
        return tensor.flatten()[packing.token_index].masked_fill(absent, padding)

    return replace(
        batch,
        input_ids=rows(batch.input_ids, 0),
        attention_mask=rows(batch.attention_mask, 0),
        labels=rows(batch.labels, -100),
        segment_ids=rows(batch.segment_ids, 0),
        packing=None,
        row_samples=(),
        pads_right=True,
    )


def first_rows(batch: TokenBatch, count: int) -> TokenBatch:
    """The first ``count`` rows of a batch of padded rows that are their own teacher text; its counts stay."""
    return replace(
        batch,
        input_ids=batch.input_ids[:count],
        attention_mask=batch.attention_mask[:count],
        labels=batch.labels[:count],
        segment_ids=batch.segment_ids[:count],
        sample_ids=batch.sample_ids[:count],
        row_samples=batch.row_samples[:count],
    )


def repacked(selection: Selection, batch: TokenBatch) -> Selection:
    """A selection made on ``unpacked(batch)``, for the rows of ``batch``."""
    packing = batch.packing
    if packing is None:
        return selection
    rows, tokens = batch.input_ids.shape
    return packed_selection(
        selection, packing.token_index, packing.token_mask, rows=rows, tokens=tokens,
        samples_per_row=packing.samples_per_row,
    )  # fmt: skip
