"""A map trained together with the student towards which it moves the teacher collapses both; the default cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvds.align import build_aligner
from kvds.align.diagnostics import effective_rank, kv_norm
from kvds.align.fitting import AlignmentMoments
from kvds.config.settings import AlignmentSettings
from kvds.kv import KVShape, KVStates, Selection
from tests.harness.kv_settings import both_parts

LAYERS, HEADS, DIM, BATCH, TOKENS = 2, 2, 4, 8, 48
SHAPE = KVShape(LAYERS, HEADS, DIM, HEADS)
EVERYTHING = Selection(None, torch.ones(BATCH, TOKENS, dtype=torch.bool))


def ranks(states: KVStates) -> float:
    found = [
        effective_rank(layer.detach().transpose(1, 2).reshape(-1, HEADS * DIM))
        for layer in (*states.keys, *states.values)
    ]
    return float(torch.stack(found).mean())


def norm(states: KVStates) -> float:
    mask = EVERYTHING.mask
    return float(
        torch.stack([kv_norm(tuple(x.detach() for x in side), mask) for side in (states.keys, states.values)]).mean()
    )


def train(**kwargs: Any) -> dict[str, float]:
    """Free student tensors against a fixed teacher; ratios of the end to the start."""
    generator = torch.Generator().manual_seed(0)
    size = (BATCH, HEADS, TOKENS, DIM)
    teacher = KVStates(*(tuple(torch.randn(size, generator=generator) for _ in range(LAYERS)) for _ in range(2)))
    student = KVStates(
        *(tuple(torch.randn(size, generator=generator).requires_grad_() for _ in range(LAYERS)) for _ in range(2))
    )
    aligner = build_aligner(SHAPE, SHAPE, both_parts(impl="reference", **kwargs))
    moments = AlignmentMoments(aligner)
    moments.update(student.detach(), teacher, EVERYTHING)
    moments.apply()
    tensors = [*student.keys, *student.values, *(p for p in aligner.parameters() if p.requires_grad)]
    optimizer = torch.optim.Adam(tensors, lr=3e-2)
    start = {"norm": norm(student), "rank": ranks(student)}
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = aligner(student=student, teacher=teacher, selection=EVERYTHING).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {
        "loss": float(losses[-1] / losses[0]),
        "norm": norm(student) / start["norm"],
        "rank": ranks(student) / start["rank"],
    }


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_joint_map_towards_the_student_collapses(mode: str) -> None:
    found = train(alignment_mode=mode, direction="teacher_to_student")
    assert found["loss"] < 0.05, found  # the prettiest of loss curves
    assert found["norm"] < 0.2, found


@pytest.mark.parametrize("mode", ["flat", "structured"])
def test_default_direction_keeps_norm_and_rank(mode: str) -> None:
    found = train(alignment_mode=mode)
    assert AlignmentSettings().direction == "student_to_teacher"
    assert found["loss"] < 0.3, found
    assert found["norm"] > 0.5 and found["rank"] > 0.8, found


def test_frozen_map_towards_the_student_does_not_collapse() -> None:
    found = train(alignment_mode="structured", direction="teacher_to_student", aligner_update="frozen", map_start="pca")
    assert found["loss"] < 0.05, found
    assert found["norm"] > 0.5 and found["rank"] > 0.8, found


def test_effective_rank_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    assert float(effective_rank(torch.randn(20_000, 6, generator=generator))) == pytest.approx(6, rel=1e-2)
    line = torch.randn(100, 1, generator=generator) @ torch.randn(1, 6, generator=generator) + 4
    assert float(effective_rank(line)) == pytest.approx(1, rel=1e-3)
    assert float(effective_rank(torch.ones(10, 6))) == 0
    two = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])  # eigenvalues in proportion 9 : 1
    wanted = torch.tensor([0.9, 0.1])
    assert float(effective_rank(two)) == pytest.approx(float((-(wanted * wanted.log()).sum()).exp()), rel=1e-5)
