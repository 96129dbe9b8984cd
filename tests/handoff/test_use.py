"""Which strength of the ridge a map is fitted with is decided by the answers that the student writes from it."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from kvds.data.batches import collate
from kvds.handoff import use
from kvds.handoff.cache_map import CacheMap, source_layers
from kvds.handoff.calibration import fit_pair
from kvds.handoff.fitting import write_fit
from kvds.handoff.moments import MapMoments
from kvds.handoff.reading import read_states
from kvds.handoff.use import answer_losses
from kvds.kv import KVShape
from kvds.kv.states import KV_PARTS
from tests.handoff.pairs import model_of, rows_of

STRENGTHS = (1e-6, 1e-1, 10.0)


def test_losses_of_maps_are_the_students_own_through_the_identity() -> None:
    model = model_of("llama", seed=1, layers=2)
    shape = KVShape.from_config(model.config)
    rows = rows_of([(4, 3, 2), (2, 2, 2), (6, 0, 1), (1, 2, 3)])
    nothing = CacheMap(shape, shape, source_layers(2, 2, 1)).double()
    found = answer_losses(model, model, [nothing, CacheMap.identity(shape).double()], rows, batch_size=3)
    batch = collate(rows, range(4), 0, 1.0, 1.0)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    expected = float(F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten()).detach())
    assert found[1] == pytest.approx(expected, rel=1e-6) and abs(found[0] - expected) > 0.01 * expected


def test_the_strength_is_the_one_that_serves_the_student_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of maps fitted to every second row, judged on the others; not always the one that predicts best."""
    teacher = model_of("qwen2", seed=1, layers=3).float()
    student = model_of("llama", seed=2, layers=2, heads=2, groups=1, dim=6).float()
    rows = rows_of([(n % 5 + 2, 3, 2) for n in range(24)])
    prompts = [row.input_ids[: row.segment_ids.count(1)] for row in rows]
    seen, losses_of = [], answer_losses

    def watched(*arguments, **options):
        seen.append(arguments)
        return losses_of(*arguments, **options)

    monkeypatch.setattr(use, "answer_losses", watched)
    predicted, plain = fit_pair(teacher, student, prompts, batch_size=8, strengths=STRENGTHS)
    assert not seen and not plain.used and "used" not in plain.to_dict()
    cache_map, fit = fit_pair(teacher, student, prompts, batch_size=8, strengths=STRENGTHS, rows=rows)
    [(_, _, maps, judged)] = seen
    assert [row.example for row in judged] == list(range(1, 24, 2))
    assert list(fit.used) == ["best predicted", "1e-06", "0.1", "10"]
    assert list(fit.used.values()) == pytest.approx(losses_of(teacher, student, maps, judged, batch_size=8))
    best = min(fit.used, key=fit.used.__getitem__)
    assert best != "best predicted" and fit.to_dict()["used"] == fit.used
    number = STRENGTHS.index(float(best))
    alone, single = fit_pair(teacher, student, prompts, batch_size=8, strengths=(float(best),), rows=rows)
    for part in KV_PARTS:
        assert fit.strengths[part] == [STRENGTHS[number]] * 2
        assert fit.r2[part] == pytest.approx(single.r2[part])
        torch.testing.assert_close(cache_map.weight(part), alone.weight(part))
        torch.testing.assert_close(cache_map.bias(part), alone.bias(part))
    assert not torch.equal(cache_map.value_weight, predicted.value_weight)


@pytest.mark.parametrize(
    ("losses", "taken"),
    [([math.nan, 2.0, 1.0, math.inf], "0.1"), ([math.nan] * 4, "best predicted"), ([1.0] * 4, "best predicted")],
)
def test_a_map_whose_answers_are_no_number_does_not_serve_best(
    losses: list[float], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama", seed=1, layers=2)
    rows = rows_of([(n % 5 + 2, 3, 2) for n in range(8)])
    prompts = [row.input_ids[: row.segment_ids.count(1)] for row in rows]
    monkeypatch.setattr(use, "answer_losses", lambda *_, **__: losses)
    predicted = fit_pair(model, model, prompts, strengths=STRENGTHS)[1].strengths
    _, fit = fit_pair(model, model, prompts, strengths=STRENGTHS, rows=rows)
    expected = predicted if taken == "best predicted" else dict.fromkeys(KV_PARTS, [float(taken)] * 2)
    assert fit.by_use[0] == taken and fit.strengths == expected


def test_each_layer_is_written_with_its_own_strength_and_half() -> None:
    teacher = model_of("qwen2", seed=1, layers=3)
    rows = rows_of([(n % 5 + 6, 0, 0) for n in range(12)])
    maps = [fit_pair(teacher, teacher, [row.input_ids for row in rows], strengths=(s,))[0] for s in (1e-3, 1.0)]
    mixed = copy.deepcopy(maps[0])
    moments = MapMoments(mixed, torch.device("cpu"))
    for number, row in enumerate(rows):
        ids = torch.tensor([row.input_ids])
        states = read_states(teacher, ids, torch.ones_like(ids, dtype=torch.bool))
        moments.update(states, states, torch.ones_like(ids, dtype=torch.bool), torch.tensor([number % 2]))
    write_fit(mixed, moments, {"keys": [1e-3, 1.0, 1e-3], "values": [1.0] * 3}, half=None)
    torch.testing.assert_close(mixed.key_weight[::2], maps[0].key_weight[::2])
    torch.testing.assert_close(mixed.key_weight[1], maps[1].key_weight[1])
    torch.testing.assert_close(mixed.value_weight, maps[1].value_weight)
    # Each half by itself, whatever the other one holds: its own prediction is better than the other's.
    errors = {}
    for half in (0, 1):
        write_fit(mixed.double(), moments, {part: [1e-8] * 3 for part in KV_PARTS}, half=half)
        for number, row in enumerate(rows[:2]):
            ids = torch.tensor([row.input_ids])
            states = read_states(teacher, ids, torch.ones_like(ids, dtype=torch.bool))
            found = mixed(states)
            pairs = zip(found.values, states.values, strict=True)
            errors[half, number] = max(float((x - y).abs().max().detach()) for x, y in pairs)
    assert errors[0, 0] < errors[1, 0] and errors[1, 1] < errors[0, 1], errors
