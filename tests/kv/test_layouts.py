"""However rows lie in a batch, each sample is computed as if it stood alone: a property over the whole kind.

Keys, values, hidden states and the task loss of padded, masked, packed and single rows, against plain transformers on
one sample at a time in fp64 with its eager attention, for every family, window, scale and rotation that is taken.
``KVDS_FUZZ_EXAMPLES=1000`` draws that many new examples.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from kvds.data.batches import TokenBatch, collate, collate_packed
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.data.model_inputs import model_inputs
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.errors import InputError
from kvds.kv import KVCapture, KVShape
from kvds.kv.families import FAMILIES, backbone
from kvds.kv.row_attention import ROW_ATTENTION
from kvds.models.architecture import check_positions
from tests.kv.test_row_attention import VOCAB, config_of

EXAMPLES = os.environ.get("KVDS_FUZZ_EXAMPLES")
LONGEST = 24
ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}  # fmt: skip
MIXTURES = ("mixtral", "qwen3_moe")
VARIANTS: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    **{family: (family, None, {}) for family in sorted(FAMILIES)},
    **{f"{family}, window {n}": (family, n, {}) for family in ("mistral", "qwen2", "qwen3") for n in (1, 4, LONGEST)},
    **{f"{family}, window 4": (family, 4, {}) for family in ("gemma2", "gemma3_text", "phi3", "smollm3")},
    # All experts of a token: which ones are chosen may depend on rounding.
    **{family: (family, None, {"num_experts_per_tok": 3}) for family in MIXTURES},
    "gpt2, scaled by layer": ("gpt2", None, {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, not scaled": ("gpt2", None, {"scale_attn_weights": False}),
    "llama, biases": ("llama", None, {"attention_bias": True, "mlp_bias": True}),
    "llama, one group": ("llama", None, {"num_key_value_heads": 4}),
    "qwen3, one key head": ("qwen3", None, {"num_key_value_heads": 1}),
    **{f"llama, {name}": ("llama", None, {"rope_parameters": {"rope_theta": 1e4, **own}})
       for name, own in ROTATIONS.items()},
}  # fmt: skip
# Error against fp64 (in which norms and softmax are fp32 all the same) as a part of the norm; in bf16 beside one and a
# half times that of a sample alone in bf16.
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 0.002}
LAYOUTS = ("padded", "masked", "packed", "one row")


@cache
def models(variant: str, attention: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model, and the oracle: the same numbers in fp64, with transformers' eager attention."""
    family, window, changes = VARIANTS[variant]
    made = []
    for own, own_dtype in ((attention, dtype), ("eager", torch.float64)):
        config = config_of(family, 2, 32, window)
        config = type(config).from_dict(config.to_dict() | changes)
        if family == "gemma2" and own == "sdpa":
            own = "eager"  # transformers has no other that caps
        if family in MIXTURES:
            config._experts_implementation = "eager"  # its other ones know no fp64
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=own).eval()
        # Rounded to the dtype first: what is compared is arithmetic.
        made.append(model.to(dtype).to(own_dtype))
        for name, buffer in AutoModelForCausalLM.from_config(config).named_buffers():
            made[-1].get_buffer(name).data = buffer
    return made[0], made[1]


Found = dict[str, Tensor]


@torch.no_grad()
def alone(model: Any, samples: list[EncodedSample]) -> Found:
    """Of plain transformers, one sample at a time without a mask: every real token of all of them, and their loss."""
    parts: dict[str, list[Tensor]] = {}
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        with KVCapture(model, rope="post") as rotated, KVCapture(model) as plain:
            output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        found = {"hidden": output.hidden_states[-1][0]}
        for layer in range(2):
            found |= {f"keys {layer}": plain.states.keys[layer][0].transpose(0, 1),
                      f"rotated keys {layer}": rotated.states.keys[layer][0].transpose(0, 1),
                      f"values {layer}": plain.states.values[layer][0].transpose(0, 1)}  # fmt: skip
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
        counted = torch.tensor([segment >= 2 for segment in sample.segment_ids[1:]], dtype=torch.bool)
        losses = F.cross_entropy(output.logits[0, :-1].double(), ids[0, 1:], reduction="none")
        total += losses[counted].sum()
    return {name: torch.cat(values) for name, values in parts.items()} | {"loss": total}


@torch.no_grad()
def together(model: Any, batch: TokenBatch) -> Found:
    """The same of a batch, samples in their order."""
    dtype = next(model.parameters()).dtype
    with KVCapture(model, rope="post") as rotated, KVCapture(model) as plain:
        inputs = model_inputs(batch, model.config, dtype)
        hidden = backbone(model)(**inputs, use_cache=False).last_hidden_state
    found = {"hidden": hidden}
    for layer in range(2):
        found |= {f"keys {layer}": plain.states.keys[layer].transpose(1, 2),
                  f"rotated keys {layer}": rotated.states.keys[layer].transpose(1, 2),
                  f"values {layer}": plain.states.values[layer].transpose(1, 2)}  # fmt: skip
    if batch.packing is None:
        real = batch.attention_mask.flatten().nonzero().squeeze(1)
    else:
        order = batch.sample_ids.argsort(stable=True)
        order = order[batch.sample_ids[order] >= 0]
        real = batch.packing.token_index[order][batch.packing.token_mask[order]]
    labelled = LabelledPositions.from_labels(batch.labels)
    _, metrics = DistillationModule(model)(StepInput(batch, labelled, None, None, None, LossWeights()))
    own = {name: value.flatten(0, 1)[real] for name, value in found.items()}
    return own | {"loss": metrics["loss/task"].double() * batch.label_normalizer}


def laid_out(samples: list[EncodedSample], layout: str, capacity: int) -> TokenBatch:
    given: Any = (samples, list(range(len(samples))), 0, 3.0, 4.0)
    if layout == "padded":
        return collate(*given)
    if layout == "masked":
        batch = collate(*given)
        batch.pads_right = False
        return batch
    if layout == "packed":
        return collate_packed(*given, capacity=capacity, longest=LONGEST)
    return collate_packed(*given, capacity=8 * LONGEST, one_row=True, longest=LONGEST)


def sample_of(length: int, number: int) -> EncodedSample:
    draw = torch.Generator().manual_seed(100 * length + number)
    ids = tuple(torch.randint(1, VOCAB, (length,), generator=draw).tolist())
    prompt = length // 3
    return EncodedSample(ids, (1,) * prompt + (2,) * (length - prompt - 1) + (3,), number)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(
    max_examples=int(EXAMPLES) if EXAMPLES else 12, derandomize=not EXAMPLES, deadline=None,
    phases=[phase for phase in Phase if phase != Phase.explain],  # a failure is slow enough to shrink
)  # fmt: skip
@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=6),
    layout=st.sampled_from(LAYOUTS), attention=st.sampled_from([ROW_ATTENTION, "sdpa", "eager"]),
    dtype=st.sampled_from(list(DTYPES)), capacity=st.integers(LONGEST, 3 * LONGEST),
)  # fmt: skip
def test_each_sample_is_computed_as_if_alone(
    variant: str, lengths: list[int], layout: str, attention: str, dtype: torch.dtype, capacity: int
) -> None:
    model, oracle = models(variant, attention, dtype)
    rows = [sample_of(length, number) for number, length in enumerate(lengths)]
    expected, found = alone(oracle, rows), together(model, laid_out(rows, layout, capacity))
    single = alone(model, rows) if dtype == torch.bfloat16 else {}
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        error = float((found[name].double() - exact).norm())
        allowed = DTYPES[dtype] * float(exact.norm()) + 1e-12
        if single:
            allowed += 1.5 * float((single[name].double() - exact).norm())
        assert error <= allowed, f"{name}: {error} where {allowed} is allowed"


@pytest.mark.parametrize("variant", ["mistral, window 4", "gpt2, scaled by layer", "llama, yarn"])
def test_what_a_variant_changes_is_seen(variant: str) -> None:
    """Otherwise the property above would hold of a model that leaves it out, too."""
    family = VARIANTS[variant][0]
    rows = [sample_of(LONGEST, 0)]
    own, plain = (alone(models(name, "eager", torch.float64)[1], rows)["hidden"] for name in (variant, family))
    assert (own - plain).norm() > 1e-3 * plain.norm()


def test_a_rotation_that_depends_on_the_longest_row_is_refused_beyond_where_it_changes() -> None:
    factors = [1.0 + i / 7 for i in range(4)]
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
                "short_factor": factors, "long_factor": [2 * factor for factor in factors]}  # fmt: skip
    config = config_of("llama", 2, 32, None)
    config = type(config).from_dict(config.to_dict() | {"rope_parameters": longrope})
    check_positions(config, 16, flag="student")
    with pytest.raises(InputError, match="max_length=17: the student's rotation .longrope. changes for all rows of a"):
        check_positions(config, 17, flag="student")
    # It does change: the keys of a short row beside a long one are not those that it has alone.
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rows = [sample_of(LONGEST, 0), sample_of(5, 1)]
    beside, own = together(model, laid_out(rows, "padded", LONGEST)), alone(model, rows)
    assert not torch.allclose(beside["rotated keys 0"][LONGEST:], own["rotated keys 0"][LONGEST:], rtol=1e-2)


@pytest.mark.parametrize("changes", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_attention_to_what_comes_later_is_refused(changes: dict[str, bool]) -> None:
    config = AutoConfig.for_model("gemma", num_hidden_layers=2, hidden_size=32, num_attention_heads=2)
    KVShape.from_config(config)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=f"{next(iter(changes))}={next(iter(changes.values()))}: its attention sees"):
        KVShape.from_config(config)
