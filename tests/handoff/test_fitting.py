"""The streamed fit is the ridge regression of all rows at once; its strength is chosen by texts it has not seen."""

import pytest
import torch

from kvds.errors import InputError
from kvds.handoff.cache_map import CacheMap, source_layers
from kvds.handoff.calibration import fit_pair
from kvds.handoff.fitting import fit_map
from kvds.handoff.moments import MapMoments
from kvds.handoff.reading import read_states
from kvds.kv import KVShape, KVStates
from kvds.kv.states import KV_PARTS
from tests.handoff.pairs import model_of, rows_of

TEACHER, STUDENT = KVShape(4, 2, 3, 4), KVShape(3, 1, 4, 2)
CPU = torch.device("cpu")


def states(shape, batch, tokens, generator):
    size = (batch, shape.num_key_value_heads, tokens, shape.head_dim)
    return KVStates(
        *(tuple(torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(shape.num_hidden_layers))
          for _ in range(2))
    )  # fmt: skip


def flat(layer, mask):
    return layer.transpose(1, 2).flatten(2)[mask]


@pytest.mark.parametrize("layers", [1, 2, None])
def test_streamed_moments_give_the_ridge_solution_of_all_rows(layers):
    """Batches of several shapes with padding, against a solve of the stacked rows in units of their deviation."""
    generator = torch.Generator().manual_seed(0)
    sources = source_layers(3, 4, layers)
    cache_map = CacheMap(TEACHER, STUDENT, sources).double()
    moments = MapMoments(cache_map, CPU)
    kept = []
    for tokens in (5, 9, 3):
        teacher, student = states(TEACHER, 4, tokens, generator), states(STUDENT, 4, tokens, generator)
        mask = torch.rand(4, tokens, generator=generator) < 0.8
        moments.update(teacher, student, mask, torch.tensor([0, 1, 0, 1]))
        kept.append((teacher, student, mask))
    fit = fit_map(cache_map, moments, (1e-3,))
    assert fit.rows == sum(int(mask.sum()) for *_, mask in kept)
    for part in KV_PARTS:
        for layer, read in enumerate(sources):
            x = torch.cat([torch.cat([flat(getattr(t, part)[s], m) for s in read], -1) for t, _, m in kept])
            y = torch.cat([flat(getattr(s, part)[layer], m) for _, s, m in kept])
            unit = x.std(0, correction=0)
            z, centred = (x - x.mean(0)) / unit, y - y.mean(0)
            solved = torch.linalg.solve(z.T @ z + 1e-3 * len(z) * torch.eye(z.shape[1]).double(), z.T @ centred)
            weight = solved / unit[:, None]
            torch.testing.assert_close(cache_map.weight(part)[layer], weight, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(cache_map.bias(part)[layer], y.mean(0) - x.mean(0) @ weight)


def test_the_strength_is_the_best_on_texts_that_were_not_fitted():
    """Noise rows want a strong ridge, a true linear map a weak one; R² is what is explained of the other half."""
    generator = torch.Generator().manual_seed(0)
    cache_map = CacheMap(TEACHER, STUDENT, source_layers(3, 4)).double()
    moments = MapMoments(cache_map, CPU)
    true = torch.randn(24, 12, generator=generator, dtype=torch.float64)
    teacher = states(TEACHER, 8, 10, generator)
    rows = torch.cat([layer.transpose(1, 2).flatten(2) for layer in teacher.keys], -1)
    linear = (rows @ true).unflatten(-1, (3, 1, 4)).permute(2, 0, 3, 1, 4)
    student = KVStates(tuple(linear), states(STUDENT, 8, 10, generator).values)
    moments.update(teacher, student, torch.ones(8, 10, dtype=torch.bool), torch.arange(8) % 2)
    fit = fit_map(cache_map, moments)
    assert min(fit.r2["keys"]) > 0.999 and max(fit.strengths["keys"]) <= 1e-6
    assert max(fit.r2["values"]) < 0.1 and min(fit.strengths["values"]) >= 0.1
    assert fit.mean_r2["keys"] == pytest.approx(sum(fit.r2["keys"]) / 3)


def test_a_pair_is_fitted_on_prompts_of_different_lengths():
    """To itself a model is mapped exactly, whatever the batches, and from all layers as from its own."""
    model = model_of("qwen2", seed=1, layers=2)
    prompts = [row.input_ids for row in rows_of([(n, 0, 0) for n in (9, 4, 7, 5, 8, 6, 9, 3) * 5])]
    ids = torch.tensor([prompts[0]])
    own = read_states(model, ids, torch.ones_like(ids, dtype=torch.bool))
    found = []
    for batch_size, layers in ((3, 1), (8, 1), (8, None)):
        cache_map, fit = fit_pair(model, model, prompts, layers=layers, batch_size=batch_size, strengths=(1e-8,))
        mapped = cache_map.double()(own)
        if layers == 1:
            for part in KV_PARTS:
                assert min(fit.r2[part]) > 0.99
                for mine, theirs in zip(getattr(own, part), getattr(mapped, part), strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
            found.append(cache_map.key_weight)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_fitted_is_refused():
    model = model_of("qwen2", seed=1, layers=2)
    with pytest.raises(InputError, match="1 prompts; expected at least two"):
        fit_pair(model, model, [(3, 4)])
    with pytest.raises(InputError, match="--ridge 0: expected strengths above 0"):
        fit_pair(model, model, [(3, 4), (5, 6)], strengths=(0,))
    cache_map = CacheMap(TEACHER, STUDENT, source_layers(3, 4))
    with pytest.raises(InputError, match="0 tokens to fit"):
        fit_map(cache_map, MapMoments(cache_map, CPU))
    generator = torch.Generator().manual_seed(0)
    teacher, student = states(TEACHER, 1, 2, generator), states(STUDENT, 1, 2, generator)
    teacher.keys[1][0, 0, 1, 0] = torch.nan
    everything = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(InputError, match="the teacher's keys are not finite"):
        MapMoments(cache_map, CPU).update(teacher, student, everything, torch.tensor([0]))
    with pytest.raises(InputError, match="expected 4 × 2 × 3"):
        MapMoments(cache_map, CPU).update(student, student, everything, torch.tensor([0]))
