"""Layer mixes are found where they were planted."""

import numpy as np
import pytest
import torch

from kvds.align import build_aligner
from kvds.align.fitting import fit_aligner
from kvds.align.mix_fitting import FLOOR, MixFit, MixFitting, MixMoments, fit_mix, simplex_minimum, with_floor
from kvds.align.ridge import ridge_map
from kvds.kv import KVShape, KVStates, Selection
from kvds.kv.hidden import HiddenStates
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


MODES = {
    "structured": {"alignment_mode": "structured"},
    "shared": {"alignment_mode": "structured", "map_proj_share_dim": True},
    "grouped": {"alignment_mode": "structured", "layer_groups": 2},
    "flat": {"alignment_mode": "flat", "layer_map": "learned"},
    "hidden": {"alignment_mode": "hidden"},
}
ORDER = (1, 0, 3, 2)  # the source layer that each target layer is made of, within its group


def pair_of(mode, samples=12):
    """An aligner of four source and four target layers, and batches whose target layers are maps of others' rows."""
    shape = KVShape(4, 2, 4, 2, hidden_size=8)
    settings = both_parts(**MODES[mode], map_start="ridge", **({} if mode == "hidden" else {"kv_parts": "v"}))
    aligner = build_aligner(shape, shape, settings).double()
    planted = draw(99, 8, 8) if mode in ("flat", "hidden") else torch.block_diag(*[draw(99, 4, 4)] * 2)
    batches = []
    for number in range(2):
        rows = [(1 + layer) * draw(10 * number + layer, samples, 20, 8) for layer in range(4)]
        noise = [0.1 * draw(70 + layer, samples, 20, 8) for layer in range(4)]
        made = [(rows[layer] @ planted + noise[layer]) * (4 - i) for i, layer in enumerate(ORDER)]
        states = []
        for layers in (rows, made):
            if mode == "hidden":
                states.append(HiddenStates(tuple(layer.unsqueeze(1) for layer in layers)))
            else:
                heads = tuple(layer.unflatten(2, (2, 4)).transpose(1, 2) for layer in layers)
                states.append(KVStates(heads, heads))
        selection = Selection(None, torch.ones(samples, 20, dtype=torch.bool))
        batches.append((*states, selection))
    return aligner, batches


@pytest.mark.parametrize("mode", MODES)
def test_a_mix_is_fitted_before_the_maps_and_on_any_number_of_ranks(mode):
    aligner, batches = pair_of(mode)
    before = fit_aligner(pair_of(mode)[0], batches)
    [part] = aligner.parts.values()
    first, second = MixFitting(aligner), MixFitting(aligner)
    first.update(*batches[0])
    second.update(*batches[1])
    other = [tensor.clone() for moments in second.parts.values() for tensor in moments.tensors]
    sums = iter(other)
    first.reduce(lambda tensor: tensor.add_(next(sums)))
    first.apply()
    mix = part.layer_mix()
    assert mix.argmax(1).tolist() == list(ORDER) and (mix.max(1).values > 0.9).all()
    alone = pair_of(mode)[0]
    whole = MixFitting(alone)
    for batch in batches:
        whole.update(*batch)
    whole.apply()
    for name, found in alone.parts.items():
        torch.testing.assert_close(found.layer_mix(), aligner.parts[name].layer_mix())
    after = fit_aligner(aligner, batches)
    for name, layers in after.items():
        assert min(layers) > 0.9 > 0.5 > max(before[name])


def test_a_part_without_a_mix_or_without_a_fit_is_left_alone():
    shape = KVShape(3, 1, 4, 1)
    for changes in (
        {"layer_map": "endpoint", "map_start": "ridge"},
        {"map_start": "procrustes"},
        {"map_start": "random"},
    ):
        assert not MixFitting(build_aligner(shape, shape, both_parts(**changes))).parts


def test_of_unrelated_states_no_start_is_worse_than_the_mean():
    for mode in MODES:
        aligner, batches = pair_of(mode, samples=3)
        unrelated = [(student, type(teacher)(*(tuple(torch.roll(layer, 7, 2).flip(3) for layer in field)
                      for field in teacher)), selection) for student, teacher, selection in batches]  # fmt: skip
        mixes = MixFitting(aligner)
        for batch in unrelated:
            mixes.update(*batch)
        mixes.apply()
        for layers in fit_aligner(aligner, unrelated).values():
            assert min(layers) >= 0, mode
