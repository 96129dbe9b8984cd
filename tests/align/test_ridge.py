"""Maps in closed form: their strength is the one that serves held-out rows, and they never start worse than a mean."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kvds.align import build_aligner
from kvds.align.fitting import AlignmentMoments, fit_aligner, halves_of
from kvds.align.ridge import STRENGTHS, Moments, fit_ridge, held_out_residuals, ridge_map
from kvds.errors import InputError
from kvds.kv import AttentionStates, KVShape, KVStates, Selection
from kvds.kv.hidden import HiddenStates
from tests.harness.kv_settings import both_parts

MODES = [
    {"alignment_mode": "flat"},
    {"alignment_mode": "flat", "layer_map": "learned"},
    {"alignment_mode": "structured"},
    {"alignment_mode": "structured", "map_proj_share_dim": True},
    {"alignment_mode": "structured", "layer_map": "endpoint"},
    {"alignment_mode": "hidden"},
    {"alignment_mode": "hidden", "map_proj_share_dim": True, "layer_map": "endpoint"},
]
DIRECTIONS = ("student_to_teacher", "teacher_to_student")


def moments(x: Tensor, y: Tensor) -> Moments:
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    count = x.new_tensor(float(len(x)))
    return Moments(count, mean_x, mean_y, x.T @ x / count, x.T @ y / count, y.square().sum() / count)


def draw(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def everything(states, tokens: int, batch: int) -> Selection:
    return Selection(None, torch.ones(batch, tokens, dtype=torch.bool))


# -- one map ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", STRENGTHS[:-1])
def test_a_map_equals_the_normal_equations(strength):
    x, y = draw(0, 40, 4), draw(1, 40, 3)
    found = ridge_map(x.T @ x / 40, x.T @ y / 40, strength)
    weight = strength * (x.square().sum() / 40 / 4) * 40
    expected = np.linalg.solve(x.T.numpy() @ x.numpy() + weight.item() * np.eye(4), x.T.numpy() @ y.numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0, 100.0])
def test_the_strength_is_the_one_that_leaves_least_of_either_half(noise):
    """Against rows in numpy, one strength after the other."""
    x, planted = draw(0, 60, 12) * torch.linspace(0.1, 3, 12, dtype=torch.float64) + 2, draw(1, 12, 5)
    y = x @ planted + noise * draw(2, 60, 5) - 1
    parts = [(x[:25], y[:25]), (x[25:], y[25:])]
    left = []
    for strength in STRENGTHS:
        total = 0.0
        for (a, b), (c, d) in (parts, parts[::-1]):
            a, b, c, d = (t.numpy() for t in (a, b, c, d))
            centred = a - a.mean(0)
            xx = centred.T @ centred / len(a)
            penalty = strength * np.trace(xx) / 12
            if math.isinf(strength):
                weight = np.zeros((12, 5))
            else:
                weight = np.linalg.solve(xx + penalty * np.eye(12), centred.T @ (b - b.mean(0)) / len(a))
            total += np.square(d - b.mean(0) - (c - a.mean(0)) @ weight).sum()
        left.append(total)
    halves = [moments(*parts[0])], [moments(*parts[1])]
    np.testing.assert_allclose(held_out_residuals(halves, STRENGTHS)[:, 0].numpy(), left, rtol=1e-8)
    fitted, rest, of_mean = fit_ridge([moments(x, y)], halves)
    chosen = int(np.argmin(left)) if min(left) < 0.99 * left[-1] else -1
    best = STRENGTHS[chosen]
    expected = ridge_map(moments(x, y).xx, moments(x, y).xy, best)
    np.testing.assert_allclose(fitted.numpy(), np.zeros((12, 5)) if expected is None else expected.numpy(), rtol=1e-9)
    np.testing.assert_allclose([rest.item(), of_mean.item()], [left[chosen], left[-1]], rtol=1e-8)


def test_strengths_differ_with_the_noise():
    chosen = set()
    for noise in (0.01, 3.0, 1000.0):
        x, y = draw(0, 60, 12), draw(1, 60, 12)
        y = x + noise * y
        left = held_out_residuals(([moments(x[:30], y[:30])], [moments(x[30:], y[30:])]), STRENGTHS).sum(1)
        chosen.add(int(left.argmin()))
    assert len(chosen) == 3


def test_a_shared_map_is_chosen_for_all_its_uses_together():
    planted = draw(9, 6, 4)
    xs, noises = [draw(i, 30, 6) for i in range(3)], [draw(10 + i, 30, 4) for i in range(3)]
    pairs = [(x, x @ planted + 0.5 * noise) for x, noise in zip(xs, noises, strict=True)]
    whole = [moments(x, y) for x, y in pairs]
    halves = [moments(x[:15], y[:15]) for x, y in pairs], [moments(x[15:], y[15:]) for x, y in pairs]
    fitted, rest, of_mean = fit_ridge(whole, halves)
    best = STRENGTHS[int(held_out_residuals(halves, STRENGTHS).sum(1).argmin())]
    xx = sum(each.xx for each in whole) / 3
    xy = sum(each.xy for each in whole) / 3
    expected = np.linalg.solve((xx + best * xx.diagonal().mean() * torch.eye(6, dtype=xx.dtype)).numpy(), xy.numpy())
    np.testing.assert_allclose(fitted.numpy(), expected, rtol=1e-9)
    assert rest.shape == of_mean.shape == (3,) and (rest < 0.3 * of_mean).all()


def test_rounding_that_left_a_covariance_indefinite_is_outgrown_and_told_where_nothing_helps():
    xy = torch.ones(3, 2, dtype=torch.float64)
    almost = torch.diag(torch.tensor([1.5, 1.5, -1.2e-3], dtype=torch.float64))
    found = ridge_map(almost, xy, 1e-4)
    assert found.isfinite().all() and (found > 0).all()  # λ grew beyond what is negative
    for bad in (torch.full((3, 3), float("nan")), torch.tensor([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]])):
        with pytest.raises(InputError, match="map_start=ridge: the covariance .*no Cholesky factor.*--calibration_bat"):
            ridge_map(bad.double(), xy, 1e-4)


@pytest.mark.parametrize("offset", [0.0, 0.1, 1e4])
def test_a_source_that_does_not_vary_is_not_mapped(offset):
    shape = KVShape(2, 1, 4, 1)
    target = states_of(shape, {"alignment_mode": "flat"}, 0, 3, 30)
    constant = KVStates(*(tuple(torch.full_like(x, offset) for x in part) for part in target))
    settings = both_parts(alignment_mode="flat", map_start="ridge")
    aligner = build_aligner(shape, shape, settings).double()
    r2 = fit_aligner(aligner, [(constant, target, everything(target, 30, 3))])
    assert r2 == {"key": [0.0, 0.0], "value": [0.0, 0.0]}
    assert aligner(constant, target, everything(target, 30, 3)).loss.item() == pytest.approx(1, rel=1e-6)


def test_thirty_layers_of_nearly_singular_rows_with_several_threads_equal_numpy():
    """Batches of this size failed inside LAPACK's LU."""
    rows = draw(0, 30, 3, 512, 4) @ draw(1, 30, 3, 4, 64) + 1e-7 * draw(2, 30, 3, 512, 64)
    xx, xy = rows.mT @ rows / 512, rows.mT @ draw(3, 30, 3, 512, 48) / 512
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = [[ridge_map(xx[i, j], xy[i, j], 1e-3) for j in range(3)] for i in range(30)]
    finally:
        torch.set_num_threads(threads)
    for i, j in itertools.product(range(30), range(3)):
        left = xx[i, j] + 1e-3 * xx[i, j].diagonal().mean() * torch.eye(64, dtype=torch.float64)
        np.testing.assert_allclose(found[i][j], np.linalg.solve(left, xy[i, j]), rtol=1e-7, atol=1e-9)


def test_many_nearly_singular_maps_with_several_threads():
    """30 layers × 3 heads of 64 dimensions, of which 5 vary: what batched LU in MKL fails at."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        shape, tokens = KVShape(30, 3, 64, 9), 48
        layers = tuple(draw(i, 2, 3, tokens, 5) @ draw(900 + i, 5, 64) for i in range(30))
        states = KVStates(layers, layers)
        settings = both_parts(alignment_mode="structured", layer_map="endpoint", map_start="ridge", kv_parts="v")
        aligner = build_aligner(shape, shape, settings).double()
        found = AlignmentMoments(aligner)
        found.update(states, states, everything(states, tokens, 2))
        r2 = found.apply()["value"]
    finally:
        torch.set_num_threads(threads)
    assert all(p.isfinite().all() for p in aligner.parameters()) and min(r2) > 0.2
    assert aligner(states, states, everything(states, tokens, 2)).loss < 0.8


# -- in every mode ----------------------------------------------------------------------------------------------------


def states_of(shape: KVShape, settings: dict, seed: int, batch: int, tokens: int):
    if settings["alignment_mode"] == "hidden":
        return HiddenStates(tuple(draw(seed + i, batch, 1, tokens, shape.hidden_size) + 3 for i in range(2)))
    size = batch, shape.num_key_value_heads, tokens, shape.head_dim
    return KVStates(*(tuple(draw(seed + 10 * p + i, *size) + 3 for i in range(2)) for p in (0, 1)))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("settings", MODES)
def test_of_noise_nothing_is_mapped_and_the_loss_is_that_of_the_mean(settings, direction):
    """Few rows of many dimensions: a map of any other strength would fit them well, and be worth less than none."""
    shape = KVShape(2, 2, 24, 2, 48)
    student, teacher = (states_of(shape, settings, seed, 2, 20) for seed in (0, 100))
    aligner = build_aligner(shape, shape, both_parts(direction=direction, map_start="ridge", **settings)).double()
    r2 = fit_aligner(aligner, [(student, teacher, everything(student, 20, 2))])
    assert {value for layers in r2.values() for value in layers} == {0.0}
    for part in aligner.parts.values():
        assert not part.projection.any()
    loss = aligner(student, teacher, everything(student, 20, 2)).loss.item()
    if direction == "student_to_teacher":  # in units of the teacher, its own deviation
        assert loss == pytest.approx(1, rel=1e-6)
    else:
        fixed, unit = [], []
        for name, part in aligner.parts.items():
            rows = torch.stack([x.transpose(1, 2).flatten(0, 1).flatten(1) for x in getattr(student, f"{name}s")])
            fixed.append(rows.var(1, correction=0).mean(1))
            unit.append(part.target_scale.square())
        assert loss == pytest.approx((torch.cat(fixed) / torch.cat(unit)).mean().item(), rel=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("settings", MODES)
def test_a_planted_map_is_found(settings, direction):
    shape = KVShape(2, 1, 6, 1, 6)
    planted = draw(77, 6, 6)
    source = states_of(shape, settings, 0, 4, 60)
    shared = type(source)(*(tuple(part[0] for _ in part) for part in source))  # whatever the mix of layers
    target = type(source)(*(tuple(x @ planted + 2 for x in part) for part in shared))
    student, teacher = (shared, target) if direction == DIRECTIONS[0] else (target, shared)
    aligner = build_aligner(shape, shape, both_parts(direction=direction, map_start="ridge", **settings)).double()
    r2 = fit_aligner(aligner, [(student, teacher, everything(student, 60, 4))])
    assert min(value for layers in r2.values() for value in layers) > 0.999
    assert aligner(student, teacher, everything(student, 60, 4)).loss < 1e-3


def test_a_cosine_always_has_a_direction():
    shape = KVShape(2, 2, 24, 2)
    settings = {"alignment_mode": "structural_kv", "attention_loss_weight": 0.0}
    student, teacher = (states_of(shape, settings, seed, 2, 20) for seed in (0, 100))
    aligner = build_aligner(shape, shape, both_parts(map_start="ridge", **settings)).double()
    fit_aligner(aligner, [(student, teacher, everything(student, 20, 2))])
    assert all(part.projection.flatten(1).any(1).all() for part in aligner.parts.values())
    with_queries = AttentionStates(student.keys, student.values, ())
    assert aligner(with_queries, teacher, everything(student, 20, 2)).loss <= 1


# -- two halves -------------------------------------------------------------------------------------------------------


def test_halves_are_balanced_and_no_row_depends_on_another():
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[1, 3:], mask[2, ::2], mask[3] = False, False, False
    found = halves_of(mask)
    assert found.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4 + [1, 0, 1] + [0, 0, 1, 1, 0, 0, 1, 1]
    alone = torch.cat([halves_of(mask[i : i + 1]) for i in range(4)])
    assert torch.equal(found, alone)


def test_packed_samples_are_halved_as_in_rows_of_their_own():
    alone = [halves_of(torch.ones(1, length, dtype=torch.bool)) for length in (7, 8, 5, 3)]
    samples = torch.tensor([[0] * 7 + [1] * 8, [2] * 5 + [3] * 3 + [-1] * 7])
    assert torch.equal(halves_of(samples >= 0, samples), torch.cat(alone))
    assert {len(half.unique()) for half in alone} == {2}


def test_a_lone_position_leaves_nothing_to_judge_and_no_map():
    shape = KVShape(2, 1, 4, 1)
    student, teacher = (states_of(shape, {"alignment_mode": "flat"}, seed, 1, 1) for seed in (0, 50))
    aligner = build_aligner(shape, shape, both_parts(alignment_mode="flat", map_start="ridge")).double()
    r2 = fit_aligner(aligner, [(student, teacher, everything(student, 1, 1))])
    assert r2 == {"key": [0.0, 0.0], "value": [0.0, 0.0]}
    assert not any(part.projection.any() for part in aligner.parts.values())
