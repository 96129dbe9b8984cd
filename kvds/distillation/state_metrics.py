"""State metrics: how large the student's states are at the selected tokens, and how many directions they use."""

from __future__ import annotations

import torch
from torch import Tensor

from kvds.align.diagnostics import covariance, effective_ranks
from kvds.distillation.step import States
from kvds.kv import Selection

PARTS = ("keys", "values", "hidden_states")
# Covariances that wait to be solved together, one call for many layers in place of a wait for the device at each.
_TOGETHER_BYTES = 64 * 2**20


@torch.no_grad()
def state_metrics(states: States, selection: Selection | None) -> dict[str, Tensor]:
    """RMS norm and effective rank of the student's states, means over layers, of the tokens selected.

    Nothing here asks the device how many tokens those are; it is waited for once for each call of the eigenvalue
    solver.

    Args:
        states: Per layer ``[B, H, T, D]``.
        selection: None: nothing is measured.

    Returns:
        ``kv/norm_PART`` and ``kv/effective_rank_PART``, scalars on the device; a rank of NaN where a state is not
        finite.
    """
    if selection is None:
        return {}
    metrics = {}
    for name in PARTS:
        layers = getattr(states, name, ())
        if not layers:
            continue
        norms, ranks, waiting = [], [], []
        for number, layer in enumerate(layers):
            rows = layer.detach().transpose(1, 2).flatten(2)  # [B, T, H·D]
            if selection.index is not None:
                rows = rows.gather(1, selection.index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
            rows, kept = rows.flatten(0, 1).float(), selection.mask.flatten()
            squares = torch.where(kept, rows.square().sum(-1), 0.0)
            norms.append((squares.sum() / kept.sum().clamp_min(1)).sqrt())
            waiting.append(covariance(rows, kept))
            if number + 1 == len(layers) or len(waiting) * waiting[0].nbytes >= _TOGETHER_BYTES:
                ranks.append(_ranks(torch.stack(waiting)))
                waiting = []
        metrics[f"kv/norm_{name}"] = torch.stack(norms).mean()
        metrics[f"kv/effective_rank_{name}"] = torch.cat(ranks).mean()
    return metrics


def _ranks(covariances: Tensor) -> Tensor:
    # An eigenvalue solver raises on what is not finite; the step itself is left out and told of elsewhere.
    finite = covariances.isfinite().flatten(1).all(1)
    ranks = effective_ranks(torch.where(finite[:, None, None], covariances, 0.0))
    return torch.where(finite, ranks, torch.nan)
