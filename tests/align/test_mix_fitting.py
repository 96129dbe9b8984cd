"""Layer mixes are found where they were planted."""

import numpy as np
import pytest
import torch

from kvds.align import build_aligner
from kvds.align.mix_fitting import FLOOR, MixFit, MixMoments, fit_mix, simplex_minimum, with_floor
from kvds.align.ridge import ridge_map
from kvds.kv import KVShape
from tests.harness.kv_settings import both_parts


def draw(seed, *size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(source, target, *, mode="structured", share_dim=False):
    """Source ``[L_x, maps, N, D]`` and target ``[L_y, maps, N, D]`` of a part with a learned mix."""
    width = source.shape[-1]
    student = KVShape(len(source), source.shape[1], width, source.shape[1])
    teacher = KVShape(len(target), target.shape[1], target.shape[-1], target.shape[1])
    settings = both_parts(alignment_mode=mode, map_proj_share_dim=share_dim, map_start="ridge")
    part = build_aligner(student, teacher, settings).double().parts["value"]
    moments = MixMoments(part)
    moments.add_rows(source, target, torch.arange(source.shape[2]) % 2)
    return part, moments


def test_the_minimum_on_the_simplex_is_numpys_where_it_lies_inside():
    rows = draw(0, 40, 4)
    planted = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    quadratic = rows.T @ rows / 40
    found = simplex_minimum(quadratic, quadratic @ planted, torch.full((4,), 0.25, dtype=torch.float64), steps=5000)
    np.testing.assert_allclose(found, planted, atol=1e-3)


@pytest.mark.parametrize("share_dim", [False, True])
def test_planted_mixes_of_two_layers_are_found(share_dim):
    source = draw(0, 5, 2, 600, 6)
    planted = torch.zeros(4, 5, dtype=torch.float64)
    for i, (a, b) in enumerate([(4, 1), (0, 3), (2, 4), (1, 0)]):
        planted[i, a], planted[i, b] = 0.6, 0.4
    maps = [draw(50 if share_dim else 50 + 2 * i + j, 6, 6) for i in range(4) for j in range(2)]
    target = torch.stack(
        [
            torch.stack([torch.einsum("l,lnd->nd", planted[i], source[:, j]) @ maps[2 * i + j] + 3 for j in range(2)])
            for i in range(4)
        ]
    )
    part, moments = moments_of(source, target, share_dim=share_dim)
    found = fit_mix(moments, part.layer_mix().detach(), torch.ones(4, 5, dtype=torch.bool), shared=share_dim)
    np.testing.assert_allclose(found, with_floor(planted, torch.ones(4, 5, dtype=torch.bool)), atol=0.05)


def test_permuted_layers_are_found():
    order = [3, 0, 4, 1, 2]
    source = draw(0, 5, 2, 400, 6)
    target = torch.stack([source[layer] @ draw(60 + layer, 6, 6) for layer in order])
    part, moments = moments_of(source, target)
    found = fit_mix(moments, part.layer_mix().detach(), torch.ones(5, 5, dtype=torch.bool), shared=False)
    assert found.argmax(1).tolist() == order and (found.max(1).values > 1 - FLOOR).all()
    assert (found >= FLOOR / 5 - 1e-12).all() and torch.allclose(found.sum(1), torch.ones(5, dtype=torch.float64))


def test_of_noise_every_layer_keeps_a_weight_and_nothing_overflows():
    source, target = draw(0, 4, 1, 60, 8), draw(1, 3, 1, 60, 8)
    part, moments = moments_of(source, target)
    allowed, start = torch.ones(3, 4, dtype=torch.bool), part.layer_mix().double()
    halves = [MixFit(moments.covariances([half]), allowed, shared=False) for half in (0, 1)]
    found = fit_mix(moments, start, allowed, shared=False)
    assert found.shape == start.shape and (found > 0).all()
    assert all(torch.isfinite(fit.residuals(found, fit.maps(found))).all() for fit in halves)


def test_a_layer_outside_the_group_gets_nothing():
    source = draw(0, 4, 1, 300, 5)
    target = torch.stack([source[3] @ draw(7, 5, 5)])
    part, moments = moments_of(source, target)
    allowed = torch.tensor([[True, True, False, False]])
    start = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert not fit_mix(moments, start, allowed, shared=False)[:, 2:].any()


def test_residuals_equal_those_of_rows_in_numpy():
    source, target = draw(0, 3, 1, 80, 4), draw(1, 2, 1, 80, 4)
    _, moments = moments_of(source, target)
    fit = MixFit(moments.covariances([0, 1]), torch.ones(2, 3, dtype=torch.bool), shared=False)
    mix = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]], dtype=torch.float64)
    found = fit.residuals(mix, fit.maps(mix))
    for i in range(2):  # the sketch is a rotation here: no dimension is lost
        x = torch.einsum("l,lnd->nd", mix[i], source[:, 0])
        x, y = x - x.mean(0), target[i, 0] - target[i, 0].mean(0)
        weight = ridge_map(x.T @ x / 80, x.T @ y / 80, 1e-2)
        np.testing.assert_allclose(found[i], ((y - x @ weight) ** 2).sum() / 80, rtol=1e-9)
