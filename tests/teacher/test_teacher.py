"""The teacher computes and keeps what the losses read: no last layer beyond its keys and values, selected rows only."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from kvds.align import build_aligner
from kvds.config import RunConfig
from kvds.config.deepspeed_file import load_deepspeed_config
from kvds.data.batches import TokenBatch
from kvds.kv import KVCapture, KVShape, ObservingRows, Selection, gather_positions, observing_rows, select_tokens
from kvds.kv.families import backbone
from kvds.kv.last_layer import only_keys_and_values
from kvds.kv.selected import SelectedCapture
from kvds.teacher.build import build_teachers
from kvds.teacher.teacher import Teacher
from tests.harness.kv_settings import both_parts

LLAMA_LIKE = {"gemma": GemmaConfig, "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config,
              "qwen3": Qwen3Config}  # fmt: skip
FAMILIES = [*LLAMA_LIKE, "gpt2"]


def model_of(family: str, layers: int = 3, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if family == "gpt2":
        config: Any = GPT2Config(vocab_size=50, n_embd=32, n_layer=layers, n_head=4, n_positions=64)
    else:
        config = LLAMA_LIKE[family](
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
        )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 50, (3, 11), generator=generator)
    mask = torch.arange(11)[None] < torch.tensor([11, 6, 9])[:, None]
    segments = torch.where(mask, 2, 0)
    labels = torch.where(mask, ids, -100)
    return TokenBatch(ids, mask.long(), labels, segments, torch.arange(3), 10.0, 10.0)


def full_states(model: Any, rope: str = "pre") -> Any:
    with torch.no_grad(), KVCapture(model, rope=rope) as capture:
        backbone(model)(input_ids=batch().input_ids, attention_mask=batch().attention_mask, use_cache=False)
    return capture.states


def flat(states: Any) -> list[Tensor]:
    return [*states.keys, *states.values]


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_stops_at_its_keys_and_values(family: str, rope: str) -> None:
    model = model_of(family)
    inputs = {"input_ids": batch().input_ids, "attention_mask": batch().attention_mask}
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = full_states(model, rope)
    calls: list[tuple[str, int]] = []

    def count(name: str, layer: int) -> Any:
        return lambda *_: calls.append((name, layer))

    layers = backbone(model).h if family == "gpt2" else backbone(model).layers
    for number, layer in enumerate(layers):
        attention = layer.attn if family == "gpt2" else layer.self_attn
        (attention.c_proj if family == "gpt2" else attention.o_proj).register_forward_hook(count("output", number))
        (layer.mlp.c_proj if family == "gpt2" else layer.mlp.down_proj).register_forward_hook(count("mlp", number))
    found = Teacher(model, device=torch.device("cpu"), rope=rope)(batch()).states
    assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(expected), strict=True))
    assert calls == [("output", 0), ("mlp", 0), ("output", 1), ("mlp", 1)]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)  # and the model is whole again


@pytest.mark.parametrize("family", FAMILIES)
def test_observed_queries_and_keys_of_a_shortened_last_layer_are_those_of_the_whole(family: str) -> None:
    model = model_of(family)

    def observe(of: TokenBatch) -> ObservingRows | None:
        return observing_rows("snapkv", of.segment_ids, of.attention_mask, observing_tokens=3)

    short, whole = (
        Teacher(model, device=torch.device("cpu"), observe=observe, wants_hidden=hidden)(batch())
        for hidden in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(flat(short.states), flat(whole.states), strict=True))
    assert short.observed is not None and whole.observed is not None and len(short.observed.layers) == 3
    for a, b in zip(short.observed.layers, whole.observed.layers, strict=True):
        assert a.queries().abs().sum() > 0 and torch.equal(a.queries(), b.queries())
        assert torch.equal(a.keys(), b.keys())


def test_a_forward_that_somebody_replaced_comes_back() -> None:
    model = model_of("qwen2")
    mlp = model.model.layers[-1].mlp
    mlp.forward = own = lambda hidden: hidden * 0
    with only_keys_and_values(model.model):
        assert mlp.forward is not own
    assert mlp.forward is own


def test_hidden_states_for_logit_distillation_come_from_the_whole_backbone() -> None:
    model = model_of("qwen2")
    with torch.no_grad():
        expected = model.model(input_ids=batch().input_ids, attention_mask=batch().attention_mask).last_hidden_state
    output = Teacher(model, device=torch.device("cpu"), wants_hidden=True)(batch())
    assert output.hidden is not None and torch.equal(output.hidden, expected)


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("family", FAMILIES)
def test_selected_rows_are_those_of_the_whole(family: str, rope: str) -> None:
    model = model_of(family)
    selection = select_tokens("right_crop", 4, batch().segment_ids, batch().attention_mask)
    assert selection.index is not None
    found = Teacher(model, device=torch.device("cpu"), rope=rope)(batch(), selection).states
    for a, b in zip(flat(found), flat(full_states(model, rope)), strict=True):
        assert a.shape == (*b.shape[:2], 4, b.shape[3]) and a.is_contiguous()
        assert torch.equal(a, gather_positions(b, selection.index))


def test_no_more_than_one_layer_is_alive_beside_what_is_selected() -> None:
    model = model_of("qwen2", layers=5)
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda _m, _a, out: outputs.append(weakref.ref(out)))
        layer.register_forward_hook(lambda *_: alive.append(sum(ref() is not None for ref in outputs)))
    selection = select_tokens("right_crop", 4, batch().segment_ids, batch().attention_mask)
    Teacher(model, device=torch.device("cpu"))(batch(), selection)
    assert max(alive) <= 1
    alive.clear(), outputs.clear()
    Teacher(model, device=torch.device("cpu"))(batch())
    assert alive[-1] == 5  # with every position wanted, the projections' outputs are the states: no copy


@pytest.mark.parametrize("budget", [None, 4])
@pytest.mark.parametrize(("part", "other"), [("keys", "values"), ("values", "keys")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_that_nothing_compares_is_let_go(family: str, part: str, other: str, budget: int | None) -> None:
    model = model_of(family)
    expected = getattr(full_states(model, "post"), part)
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    if family != "gpt2":  # which projects both at once
        for layer in backbone(model).layers:
            projection = layer.self_attn.k_proj if other == "keys" else layer.self_attn.v_proj
            projection.register_forward_hook(lambda _m, _a, out: outputs.append(weakref.ref(out)))
            layer.register_forward_hook(lambda *_: alive.append(sum(ref() is not None for ref in outputs)))
    selection = None
    if budget is not None:
        selection = select_tokens("right_crop", budget, batch().segment_ids, batch().attention_mask)
        expected = [gather_positions(layer, selection.index) for layer in expected]
    states = Teacher(model, device=torch.device("cpu"), rope="post", parts=(part,))(batch(), selection).states
    assert states is not None and getattr(states, other) == ()
    assert all(torch.equal(a, b) for a, b in zip(getattr(states, part), expected, strict=True))
    assert len(outputs) == (0 if family == "gpt2" else 3) and max(alive, default=0) <= 1
    for layer in getattr(states, part):  # and nothing that lay beside it is kept with it
        assert layer.untyped_storage().nbytes() == layer.numel() * layer.element_size()


@pytest.mark.parametrize(("kv_parts", "keys", "values"), [("auto", 0, 3), ("kv", 3, 3), ("k", 3, 0)])
def test_a_run_asks_its_teacher_for_what_it_compares(tmp_path: Path, kv_parts: str, keys: int, values: int) -> None:
    model = model_of("qwen2")
    model.save_pretrained(tmp_path)
    cfg = RunConfig(model_name=str(tmp_path), output_dir="unused", kv_parts=kv_parts)
    raw = load_deepspeed_config("ds_configs/zero0_fp32.json")
    device = torch.device("cpu")
    [teacher] = build_teachers(
        cfg, [model.config], raw, device=device, observe=lambda _batch: None, made_of=lambda _config: {}
    )
    states = teacher(batch()).states
    assert states is not None and (len(states.keys), len(states.values)) == (keys, values)


def test_a_selection_that_looks_at_keys_and_exchanged_rows_have_both() -> None:
    model = model_of("qwen2")

    def observe(of: TokenBatch) -> ObservingRows | None:
        return observing_rows("snapkv", of.segment_ids, of.attention_mask, observing_tokens=3)

    for how in ({"observe": observe}, {"shuffled": True}):
        states = Teacher(model, device=torch.device("cpu"), parts=("values",), **how)(batch()).states
        assert states is not None and len(states.keys) == len(states.values) == 3


def test_a_layer_that_does_not_run_is_an_error_and_leaves_no_hook() -> None:
    model = model_of("qwen2")
    index = torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="no forward ran"), SelectedCapture(model.model, index):
        pass
    with pytest.raises(KeyError, match="own"), SelectedCapture(model.model, index):
        raise KeyError("own")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
@pytest.mark.parametrize("mode", ["flat", "structured"])
@pytest.mark.parametrize("budget", [4, 11])
def test_the_loss_of_a_gathered_teacher_is_that_of_the_whole(mode: str, direction: str, budget: int) -> None:
    teacher, student = model_of("qwen2", 3, 1), model_of("qwen2", 2, 2)
    cfg = both_parts(alignment_mode=mode, direction=direction)
    aligner: nn.Module = build_aligner(*(KVShape.from_config(m.config) for m in (student, teacher)), cfg).double()
    selection = select_tokens("right_crop", budget, batch().segment_ids, batch().attention_mask)
    assert isinstance(selection, Selection) and selection.index is not None
    whole = full_states(teacher)
    gathered = type(whole)(*(tuple(gather_positions(x, selection.index) for x in side) for side in whole))
    results = []
    for target in (whole, gathered):
        leaves = type(whole)(*(tuple(x.double().requires_grad_() for x in side) for side in full_states(student)))
        target = type(whole)(*(tuple(x.double() for x in side) for side in target))
        loss = aligner(student=leaves, teacher=target, selection=selection).loss
        wanted = [*flat(leaves), *aligner.parameters()]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        results.append((loss.detach(), [torch.zeros(()) if g is None else g for g in gradients]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-12, atol=0)
    assert float(results[0][0]) > 0
    for a, b in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
