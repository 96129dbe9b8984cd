"""Hidden states are those that transformers returns, with exact gradients, and are missed when no forward gave them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from kvds.errors import InputError
from kvds.kv import HiddenCapture, HiddenStates, KVShape, hidden_shape, open_capture
from kvds.kv.attention_layout import output_projection
from kvds.kv.families import attention_modules, backbone

SIZES = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 30, "initializer_range": 0.2}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "gpt2": GPT2Config(n_layer=3, n_embd=16, n_head=4, n_positions=32, vocab_size=30, initializer_range=0.2),
}
IDS = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(0))


def model_of(family: str):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[family])


@pytest.mark.parametrize("family", CONFIGS)
def test_states_are_transformers_own(family):
    model = model_of(family).eval()
    with HiddenCapture(model) as capture:
        expected = model(IDS, output_hidden_states=True).hidden_states
    found = capture.states.hidden_states
    assert len(found) == 3 and found[0].shape == (2, 1, 7, 16)
    # transformers gives the embedding first, and puts the final norm into the last.
    for one, other in zip(found[:-1], expected[1:-1], strict=True):
        assert torch.equal(one[:, 0], other)
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    assert torch.equal(norm(found[-1][:, 0]), expected[-1]) and not torch.equal(found[-1][:, 0], expected[-1])
    capture.states.check(hidden_shape(KVShape.from_config(model.config)), side="student")


@pytest.mark.parametrize("family", CONFIGS)
def test_attention_outputs_are_what_attention_adds_to_the_stream(family):
    model = model_of(family).eval()
    seen = []
    for attention in attention_modules(model):
        output_projection(attention).register_forward_hook(lambda _m, _a, output: seen.append(output))
    with open_capture(model, "attention_output") as capture, HiddenCapture(model) as layers:
        model(IDS)
    found = capture.states.hidden_states
    assert len(found) == 3 and all(torch.equal(one[:, 0], other) for one, other in zip(found, seen, strict=True))
    assert not torch.equal(found[1], layers.states.hidden_states[1])
    capture.states.check(hidden_shape(KVShape.from_config(model.config)), side="student")


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_into_attention_outputs_are_the_same_under_checkpointing(family):
    plain, recomputed = (gradients(family, on, "attention_output") for on in (False, True))
    layers = gradients(family, False)
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert any(not torch.allclose(one, other) for one, other in zip(plain, layers, strict=True))


def gradients(family: str, checkpointing: bool, reads: str = "hidden") -> list[torch.Tensor]:
    model = model_of(family).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with open_capture(backbone(model), reads, require_grad=True) as capture:
        last = backbone(model)(IDS, use_cache=False).last_hidden_state
    loss = last.square().mean() + sum((i + 1) * s.sin().mean() for i, s in enumerate(capture.states.hidden_states))
    loss.backward()
    return [p.grad for p in backbone(model).parameters()]


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_exact_and_the_same_under_checkpointing(family):
    if family == "gpt2":
        CONFIGS[family].resid_pdrop = CONFIGS[family].embd_pdrop = CONFIGS[family].attn_pdrop = 0.0
    model = model_of(family).train()
    output = backbone(model)(IDS, use_cache=False, output_hidden_states=True)
    with HiddenCapture(model) as capture:  # the last layer is not among those that transformers returns un-normed
        backbone(model)(IDS, use_cache=False)
    inner = sum((i + 1) * s.sin().mean() for i, s in enumerate(output.hidden_states[1:-1]))
    (output.last_hidden_state.square().mean() + inner + 3 * capture.states.hidden_states[-1].sin().mean()).backward()
    expected = [p.grad for p in backbone(model).parameters()]
    for checkpointing in (False, True):
        for one, other in zip(gradients(family, checkpointing), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_last_forward_counts_and_none_is_an_error():
    model = model_of("qwen2").eval()
    with HiddenCapture(model) as capture:
        model(IDS[:1, :2])
        model(IDS)
    assert capture.states.hidden_states[0].shape == (2, 1, 7, 16)
    with pytest.raises(RuntimeError, match=r"no forward ran through decoder layers \[0, 1, 2\]"), HiddenCapture(model):
        pass
    assert not any(layer._forward_hooks for layer in model.model.layers)
    with (
        pytest.raises(RuntimeError, match="carry no graph"),
        torch.no_grad(),
        HiddenCapture(model, require_grad=True),
    ):
        model(IDS)
    with pytest.raises(RuntimeError, match="already open"), HiddenCapture(model) as capture, capture:
        pass


def test_another_width_is_explained():
    states = HiddenStates((torch.zeros(1, 1, 3, 8),) * 2)
    states.check(hidden_shape(KVShape(2, 2, 4, 4, 8)), side="teacher")
    with pytest.raises(InputError, match="teacher: its first batch has 2 layers × 8 hidden dimensions; expected 3 × 8"):
        states.check(hidden_shape(KVShape(3, 2, 4, 4, 8)), side="teacher")
    with pytest.raises(InputError, match="hidden_size=0"):
        hidden_shape(KVShape(2, 2, 4, 4))


def test_watched_views_receive_the_alignments_gradient_alone():
    model = model_of("qwen2").train()
    with HiddenCapture(model) as capture:
        last = model.model(IDS, use_cache=False).last_hidden_state
    seen = {}
    for layer, (view, output, heads) in enumerate(capture.watched):
        assert torch.equal(heads(output), view) and view.shape[1] == 1
        view.register_hook(lambda g, i=layer: seen.__setitem__(("view", i), g))
        output.register_hook(lambda g, i=layer: seen.__setitem__(("output", i), g))
    (last.sum() + 2 * capture.states.hidden_states[1].sum()).backward()
    assert set(seen) == {("output", 0), ("output", 1), ("output", 2), ("view", 1)}
    assert torch.equal(seen["view", 1], torch.full((2, 1, 7, 16), 2.0))
    assert not torch.allclose(seen["output", 1], seen["view", 1][:, 0])
