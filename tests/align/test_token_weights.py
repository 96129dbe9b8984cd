"""Positions with weights: the loss, its gradients and the fit before it count each as much as its weight says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvds.align import build_aligner
from kvds.align.fitting import AlignmentMoments, PartMoments, halves_of
from kvds.align.mix_fitting import MixMoments
from kvds.kv import KVShape, KVStates, Selection
from kvds.ops.reference import penalty
from tests.harness.kv_settings import both_parts

STUDENT, TEACHER = KVShape(2, 2, 3, 2), KVShape(3, 4, 6, 4)
DRAW = torch.Generator().manual_seed(5)
MASK = torch.rand(3, 9, generator=DRAW) > 0.3
INDEX = torch.arange(9).expand(3, -1) + torch.tensor([[0], [1], [2]])
WEIGHT = 3 * torch.rand(3, 9, generator=DRAW, dtype=torch.float64) * MASK


def states(shape: KVShape, seed: int) -> KVStates:
    draw = torch.Generator().manual_seed(seed)
    size = (3, shape.num_key_value_heads, 11, shape.head_dim)
    layers = [torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(2 * shape.num_hidden_layers)]
    return KVStates(tuple(layers[::2]), tuple(layers[1::2]))


@pytest.mark.parametrize("kv_loss", ["mse", "smooth_l1"])
@pytest.mark.parametrize(
    "asked",
    [
        {"alignment_mode": "flat"},
        {"alignment_mode": "flat", "layer_map": "learned"},
        {"alignment_mode": "structured", "impl": "reference"},
        {"alignment_mode": "structured", "impl": "lean"},
        {"alignment_mode": "structured", "head_groups": 2, "layer_map": "endpoint"},
    ],
    ids=lambda asked: "-".join(map(str, asked.values())),
)
def test_the_loss_is_the_weighted_mean_and_so_are_its_gradients(asked: dict[str, Any], kv_loss: str) -> None:
    aligner = build_aligner(STUDENT, TEACHER, both_parts(kv_loss=kv_loss, **asked)).double()
    student, teacher = states(STUDENT, 1), states(TEACHER, 2)
    leaves = [*student.keys, *student.values, *(p for p in aligner.parameters() if p.requires_grad)]
    for leaf in leaves:
        leaf.requires_grad_()
    found = aligner(student, teacher, Selection(INDEX, MASK, WEIGHT))

    losses = []
    for name, part in aligner.parts.items():
        source, target = part.sides(*(getattr(side, f"{name}s") for side in (student, teacher)))  # type: ignore[operator]
        rows = [torch.stack([layer[b, :, INDEX[b, m]] for b, m in MASK.nonzero().tolist()]) for layer in source]
        wanted = [torch.stack([layer[b, :, INDEX[b, m]] for b, m in MASK.nonzero().tolist()]) for layer in target]
        projected = part.projected(torch.stack(rows))  # type: ignore[operator]
        residual = (projected - torch.stack(wanted)) / part.target_scale[:, None, None, None]  # type: ignore[index]
        each = penalty(residual, kv_loss).mean((2, 3))  # [L_y, N]
        layers = (each * WEIGHT[MASK]).sum(1) / int(MASK.sum())
        torch.testing.assert_close(getattr(found, f"{name}_layers"), layers, rtol=1e-6, atol=0)
        losses.append(layers.mean())
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in (found.loss, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-10)


def test_weights_of_one_change_nothing() -> None:
    student, teacher = states(STUDENT, 1), states(TEACHER, 2)
    for mode in ("flat", "structured"):
        aligner = build_aligner(STUDENT, TEACHER, both_parts(alignment_mode=mode)).double()
        plain = Selection(INDEX, MASK)
        losses = [aligner(student, teacher, one).loss for one in (plain, replace(plain, weight=MASK.double()))]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)


def sums(moments: Any) -> list[Tensor]:
    return list(moments.tensors) if isinstance(moments, MixMoments) else [moments.count, *moments.sums.values()]


@pytest.mark.parametrize("mode", ["flat", "structured"])
@pytest.mark.parametrize("kind", ["ridge", "pca", "mix"])
def test_a_weight_is_a_position_so_many_times(kind: str, mode: str) -> None:
    settings = both_parts(alignment_mode=mode, layer_map="learned")
    part: Any = build_aligner(STUDENT, TEACHER, settings).double().parts["value"]
    times = torch.tensor([2, 1, 0, 3, 1])
    halves = torch.tensor([0, 1, 0, 1, 1])
    rows = [torch.stack([x[0, :, :5].transpose(0, 1) for x in states(shape, 3).values]) for shape in (STUDENT, TEACHER)]
    made = []
    for again, weights in ((torch.ones(5, dtype=torch.int64), times.double()), (times, None)):
        moments: Any = MixMoments(part) if kind == "mix" else PartMoments(part, kind)
        moments.add_states(*(x.repeat_interleave(again, 1) for x in rows), halves.repeat_interleave(again), weights)
        made.append(sums(moments))
    assert any(float(total.abs().max()) > 1 for total in made[0])
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_fit_reads_the_weights_of_a_selection() -> None:
    found = []
    for weight in (WEIGHT, None):
        aligner = build_aligner(STUDENT, TEACHER, both_parts(map_start="ridge")).double()
        moments = AlignmentMoments(aligner)
        moments.update(states(STUDENT, 1), states(TEACHER, 2), Selection(INDEX, MASK, weight))
        found.append(moments.parts["value"])
    halves = halves_of(MASK)
    for half in (0, 1):
        assert float(found[0].count[half]) == pytest.approx(float(WEIGHT[MASK][halves == half].sum()))
        assert float(found[1].count[half]) == int((halves == half).sum())
