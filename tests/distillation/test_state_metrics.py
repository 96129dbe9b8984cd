"""State metrics against one layer after the other, one token after the other."""

from __future__ import annotations

import math

import pytest
import torch

from kvds.align.diagnostics import effective_rank
from kvds.distillation import state_metrics as module
from kvds.distillation.state_metrics import state_metrics
from kvds.kv import KVStates, Selection


def states(layers: int = 3) -> KVStates:
    generator = torch.Generator().manual_seed(0)
    parts = [tuple(torch.randn(2, 2, 9, 4, generator=generator) for _ in range(layers)) for _ in range(2)]
    return KVStates(*parts)


def selections() -> list[Selection]:
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(9, generator=generator)[:6].sort().values for _ in range(2)])
    return [
        Selection(None, torch.rand(2, 9, generator=generator) > 0.3),
        Selection(index, torch.rand(2, 6, generator=generator) > 0.3),
    ]


@pytest.mark.parametrize("together", [2**26, 1])
@pytest.mark.parametrize("which", [0, 1])
def test_norms_and_ranks_are_those_of_the_selected_tokens(
    which: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOGETHER_BYTES", together)
    found, selection, own = state_metrics(states(), selections()[which]), selections()[which], states()
    assert set(found) == {f"kv/{what}_{part}" for what in ("norm", "effective_rank") for part in ("keys", "values")}
    for part, layers in (("keys", own.keys), ("values", own.values)):
        norms, ranks = [], []
        for layer in layers:
            places = range(9) if selection.index is None else None
            rows = [
                layer[b, :, j if places else int(selection.index[b, j])].flatten().double()  # type: ignore[index]
                for b in range(2) for j in range(selection.mask.shape[1]) if selection.mask[b, j]
            ]  # fmt: skip
            norms.append(math.sqrt(sum(float(row.square().sum()) for row in rows) / len(rows)))
            ranks.append(float(effective_rank(torch.stack(rows))))
        assert float(found[f"kv/norm_{part}"]) == pytest.approx(sum(norms) / len(norms), rel=1e-5)
        assert float(found[f"kv/effective_rank_{part}"]) == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)


def test_what_is_not_selected_is_not_used_and_what_is_not_finite_has_no_rank() -> None:
    selection, own = selections()[0], states()
    clean = state_metrics(own, selection)
    for layer in own.values:
        layer.transpose(1, 2)[~selection.mask] = math.nan
    same = state_metrics(own, selection)
    assert all(torch.equal(same[key], value) for key, value in clean.items())
    own.values[1].transpose(1, 2)[selection.mask.nonzero()[0].tolist()[0], selection.mask.nonzero()[0].tolist()[1]] = (
        math.inf
    )
    spoilt = state_metrics(own, selection)
    assert math.isnan(float(spoilt["kv/effective_rank_values"])) and not math.isfinite(float(spoilt["kv/norm_values"]))
    assert torch.equal(spoilt["kv/effective_rank_keys"], clean["kv/effective_rank_keys"])


def test_nothing_selected_is_nothing() -> None:
    found = state_metrics(states(), Selection(None, torch.zeros(2, 9, dtype=torch.bool)))
    assert all(float(value) == 0 for value in found.values()) and state_metrics(states(), None) == {}
