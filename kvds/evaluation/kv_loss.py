"""The KV loss on held-out rows, through the engine, since under ZeRO-3 no rank holds the aligner alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kvds.data.batches import TokenBatch
from kvds.data.loader import BatchLoader
from kvds.distillation.step import StepInput
from kvds.distributed.process_group import all_reduce_sum

_KEYS = {"loss/kv": "kv_loss", "loss/kv_keys": "kv_loss_keys", "loss/kv_values": "kv_loss_values",
         "loss/kv_attention": "kv_loss_attention"}  # fmt: skip


@torch.no_grad()
def held_out_kv_loss(
    engine: torch.nn.Module,
    loader: BatchLoader,
    make_input: Callable[[TokenBatch], StepInput],
    *,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean KV loss per selected position over all rows of ``loader`` and all ranks; every rank calls it.

    Args:
        engine: The DeepSpeed engine; left in evaluation mode.
        loader: Held-out rows; equally many batches on each rank.
        make_input: From a batch to the student's input with the teacher's output.
        between_batches: Called before each batch, equally often on all ranks.

    Returns:
        ``kv_loss`` and, where they are matched, ``kv_loss_keys``, ``kv_loss_values`` and ``kv_loss_attention``.
    """
    engine.eval()
    sums: dict[str, Tensor] = {}
    positions = 0.0
    for step in range(loader.steps_per_epoch):
        for batch in loader.step(step):
            between_batches()
            metrics = engine(step=replace(make_input(batch), teacher_head=None))[1]
            # A step's value is a mean over its positions: weigh it by how many those are.
            positions += batch.position_normalizer
            for key in _KEYS.keys() & metrics.keys():
                share = metrics[key].double() * batch.position_normalizer
                sums[key] = sums[key] + share if key in sums else share
    names = sorted(sums)
    device = sums[names[0]].device
    totals = torch.stack([*(sums[name] for name in names), torch.tensor(positions, dtype=torch.float64, device=device)])
    all_reduce_sum(totals)
    *values, count = totals.tolist()
    return {_KEYS[name]: value / count for name, value in zip(names, values, strict=True)}
