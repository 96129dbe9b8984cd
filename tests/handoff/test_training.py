"""A map trained between two frozen models hands off better by what it is trained on, and moves nothing else."""

import copy

import pytest
import torch
from torch.nn import functional as F

from kvds.data.batches import collate
from kvds.handoff.attention_error import attention_output_error, own_attention
from kvds.handoff.cache_map import CacheMap
from kvds.handoff.calibration import fit_pair
from kvds.handoff.continuation import Continuation
from kvds.handoff.reading import read_states
from kvds.handoff.training import MapTraining
from kvds.kv import KVShape
from kvds.kv.families import attention_modules, backbone
from tests.handoff.pairs import model_of, rows_of


@pytest.mark.parametrize(("family", "more"), [("llama", {}), ("mistral", {"sliding_window": 4}), ("gpt2", {})])
def test_attention_output_error_is_that_of_the_models_own_attention(family, more):
    """With the own cache 0; with one layer's values doubled what the output projection is given, doubled by hand."""
    model = model_of(family, seed=3, layers=2, **more)
    batch = collate(rows_of([(6, 3, 2), (2, 2, 2)]), range(2), 0, 1.0, 1.0)
    row = Continuation.from_batch(batch)
    own = own_attention(model, batch.input_ids, batch.attention_mask)
    states = row.prompt_states(read_states(model, batch.input_ids, batch.attention_mask.bool()))
    torch.testing.assert_close(attention_output_error(model, own, states, row), torch.zeros(2), atol=1e-10, rtol=0)
    zeros = type(states)(states.keys, tuple(torch.zeros_like(layer) for layer in states.values))
    found = attention_output_error(model, own, zeros, row)

    outputs = []
    module = attention_modules(model)[0]
    projection = module.o_proj if hasattr(module, "o_proj") else module.c_proj
    value = module.v_proj if hasattr(module, "v_proj") else None
    if value is None:
        return  # its values are columns of one projection: the first half of the test is enough
    prompt = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    prompt.scatter_(1, row.prompt_index, row.prompt_mask)
    hooks = [projection.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))]
    for emptied in (False, True):
        if emptied:
            hooks.append(value.register_forward_hook(lambda _m, _a, out: out.masked_fill(prompt[..., None], 0.0)))
        backbone(model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for hook in hooks:
        hook.remove()
    wanted, changed = (o.gather(1, row.index[..., None].expand(-1, -1, o.shape[-1]))[row.mask] for o in outputs)
    expected = (changed - wanted).square().sum() / wanted.square().sum()
    assert expected > 0.01
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def pair():
    teacher = model_of("qwen2", seed=1, layers=3, heads=4, groups=2, dim=8).float()
    student = model_of("llama", seed=2, layers=2, heads=2, groups=1, dim=6).float()
    rows = rows_of([(n % 5 + 2, 3, 2) for n in range(24)])
    prompts = [row.input_ids[: row.segment_ids.count(1)] for row in rows]
    return teacher, student, rows, fit_pair(teacher, student, prompts, batch_size=8)[0]


@pytest.mark.parametrize("what", ["attention", "answers"])
def test_training_lessens_its_loss_and_moves_the_map_alone(pair, what):
    teacher, student, rows, fitted = pair
    cache_map = copy.deepcopy(fitted)
    before = [p.clone() for model in (teacher, student) for p in model.parameters()]
    training = MapTraining(teacher, student, cache_map, rows, batch_size=24)
    losses = getattr(training, what)(30, 3e-3)
    assert len(losses) == 30 and losses[-1] < 0.97 * losses[0], losses
    after = [p for model in (teacher, student) for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(cache_map.value_weight, fitted.value_weight)


def test_the_answers_loss_is_the_students_own_cross_entropy_through_the_identity():
    model = model_of("llama", seed=1, layers=2)
    rows = rows_of([(4, 3, 2), (2, 2, 2), (6, 0, 1)])
    training = MapTraining(model, model, CacheMap.identity(KVShape.from_config(model.config)).double(), rows)
    batch = collate(rows, range(3), 0, 1.0, 1.0)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
    assert float(training.answers(1, 1e-9)[0]) == pytest.approx(float(expected), rel=1e-6)
