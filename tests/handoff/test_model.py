"""A student that reads its teacher's cache through the right map writes what it would write alone, and nothing else."""

import pytest
import torch

from kvds.data.batches import collate
from kvds.errors import InputError
from kvds.handoff.cache_map import CacheMap, source_layers
from kvds.handoff.continuation import Continuation, continue_from
from kvds.handoff.model import HandoffModel, generate_from
from kvds.handoff.reading import fill_cache, read_states
from kvds.kv import KVShape, KVStates, families
from kvds.kv.families import backbone
from tests.handoff.pairs import model_of, rows_of

FAMILIES = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma": {},
    "gemma3_text": {"sliding_window": 4},
    "gpt2": {},
}
PROMPTS = [[5, 9, 17, 4, 30, 8, 12], [44, 3], [21, 7, 7, 35, 6]]


def batch_of(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_is_its_teacher_writes_the_same_tokens(family):
    """Batches with padding, GQA, a window shorter than the prompts, learned and rotary positions."""
    model = model_of(family, seed=1, layers=3, **FAMILIES[family])
    ids, mask = batch_of(PROMPTS)
    limits = {"max_new_tokens": 12, "do_sample": False}
    handoff = HandoffModel(model, model, CacheMap.identity(KVShape.from_config(model.config)))
    found = handoff.generate(ids, mask, **limits)
    expected = model.generate(input_ids=ids, attention_mask=mask, **limits)
    assert torch.equal(found, expected)
    alone = [model.generate(torch.tensor([row]), **limits)[0, len(row) :].tolist() for row in PROMPTS]
    for row, written in zip(found[:, ids.shape[1] :].tolist(), alone, strict=True):
        assert row[: len(written)] == written
    assert len({tuple(row) for row in alone}) == 3  # a model that says the same to everyone shows nothing


# What their modules cannot do in fp64, or take besides.
OTHERS = {
    "gpt_neox": {"num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "gemma2": {"sliding_window": 4},
}


@pytest.mark.parametrize("family", sorted(set(families.FAMILIES) - set(FAMILIES)))
def test_every_other_family_writes_the_same_tokens_and_hidden_states(family):
    model = model_of(family, seed=1, layers=3, **OTHERS.get(family, {})).float()
    ids, mask = batch_of(PROMPTS)
    handoff = HandoffModel(model, model, CacheMap.identity(KVShape.from_config(model.config)))
    limits = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(input_ids=ids, attention_mask=mask, **limits)
    assert torch.equal(handoff.generate(ids, mask, **limits), expected)
    batch = collate(rows_of([(6, 3, 2), (1, 2, 2)]), range(2), 0, 1.0, 1.0)
    row = Continuation.from_batch(batch)
    states = row.prompt_states(read_states(model, batch.input_ids, batch.attention_mask.bool()))
    found = continue_from(model, states, row, batch.input_ids)
    whole = backbone(model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    wanted = whole.gather(1, row.index[..., None].expand(-1, -1, whole.shape[-1]))
    torch.testing.assert_close(found[row.mask], wanted[row.mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_and_another_rows_cache_change_what_is_written(family):
    model = model_of(family, seed=1, layers=3, **FAMILIES[family])
    ids, mask = batch_of(PROMPTS)
    before = mask[:, :-1].bool()
    states = read_states(model, ids[:, :-1], before)
    expected = generate_from(model, states, before, ids, mask, max_new_tokens=12, do_sample=False)
    zeros = type(states)(*(tuple(torch.zeros_like(layer) for layer in part) for part in states))
    other = type(states)(*(tuple(layer.flip(0) for layer in part) for part in states))
    for wrong in (zeros, other):
        found = generate_from(model, wrong, before, ids, mask, max_new_tokens=12, do_sample=False)
        assert not torch.equal(found[0], expected[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_over_a_filled_cache_are_those_of_the_whole_row(family):
    """Forward and gradients of the answer tokens alone, over the model's own cache, against the plain forward."""
    model = model_of(family, seed=2, layers=2, **FAMILIES[family])
    samples = rows_of([(6, 3, 2), (1, 2, 2), (3, 0, 2)])
    batch = collate(samples, range(3), 0, 1.0, 1.0)
    row = Continuation.from_batch(batch)
    states = row.prompt_states(read_states(model, batch.input_ids, batch.attention_mask.bool()))
    found = continue_from(model, states, row, batch.input_ids)
    whole = backbone(model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    expected = whole.gather(1, row.index[..., None].expand(-1, -1, whole.shape[-1]))
    torch.testing.assert_close(found[row.mask], expected[row.mask], rtol=1e-9, atol=1e-9)
    labelled = [
        batch.input_ids[i, t + 1] for i in range(3) for t in range(11)
        if t + 1 < batch.labels.shape[1] and batch.labels[i, t + 1] != -100
    ]  # fmt: skip
    assert row.labelled.target.tolist() == [int(t) for t in labelled]
    rows, places = row.labelled.index // row.index.shape[1], row.labelled.index % row.index.shape[1]
    after = batch.input_ids[rows, row.index[rows, places] + 1]
    assert torch.equal(after, row.labelled.target)


def test_the_map_reads_every_head_of_its_layers():
    """Against loops, for other head counts, dimensions and depths."""
    teacher, student = KVShape(5, 3, 4, 6), KVShape(3, 2, 6, 4)
    sources = source_layers(3, 5, 2)
    assert sources == [[0, 1], [2, 3], [3, 4]] and source_layers(3, 5) == [[0, 1, 2, 3, 4]] * 3
    cache_map = CacheMap(teacher, student, sources).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in cache_map.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    states = KVStates(
        *(tuple(torch.randn(2, 3, 7, 4, generator=generator, dtype=torch.float64) for _ in range(5)) for _ in range(2))
    )
    mapped = cache_map(states)
    for part in ("keys", "values"):
        weight, bias = cache_map.weight(part), cache_map.bias(part)
        for layer, read in enumerate(sources):
            for head in range(2):
                out = bias[layer, head * 6 : (head + 1) * 6].expand(2, 7, 6).clone()
                for place, source in enumerate(read):
                    for other in range(3):
                        begin = (place * 3 + other) * 4
                        block = weight[layer, begin : begin + 4, head * 6 : (head + 1) * 6]
                        out += getattr(states, part)[source][:, other] @ block
                torch.testing.assert_close(getattr(mapped, part)[layer][:, head], out)


def test_one_token_prompts_and_padding_after_a_prompt():
    model = model_of("llama", seed=1, layers=2)
    handoff = HandoffModel(model, model, CacheMap.identity(KVShape.from_config(model.config)))
    one = torch.tensor([[7], [9]])
    limits = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(handoff.generate(one, **limits), model.generate(input_ids=one, **limits))
    with pytest.raises(InputError, match="padding_side='left'"):
        handoff.generate(torch.tensor([[7, 0]]), torch.tensor([[1, 0]]))


def test_a_map_of_another_pair_and_too_many_layers_are_refused():
    model = model_of("llama", seed=1, layers=2)
    shape = KVShape(3, 2, 8, 4)
    with pytest.raises(InputError, match="3 layers × 2 KV heads × 8 dimensions, this one has 2 layers"):
        HandoffModel(model, model, CacheMap.identity(shape))
    with pytest.raises(InputError, match="--source_layers 6: expected 1 to 5"):
        source_layers(3, 5, 6)
    with pytest.raises(InputError, match="equally many"):
        CacheMap(shape, shape, [[0], [1, 2], [2]])


def test_a_window_shorter_than_the_prompt_keeps_what_it_sees():
    model = model_of("mistral", seed=1, layers=2, sliding_window=4)
    ids, mask = batch_of(PROMPTS)
    before = mask[:, :-1].bool()
    cache = fill_cache(model, read_states(model, ids[:, :-1], before), before)
    assert cache.get_seq_length() == 6 and cache.layers[0].keys.shape[2] == 3
