"""Values in the metric of the attention output: distances are those at the output of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kvds.align import build_aligner
from kvds.errors import InputError
from kvds.kv import KVShape, KVStates, Selection
from kvds.kv.families import attention_modules
from kvds.teacher.output_metric import in_output_metric, output_roots
from tests.harness.kv_settings import both_parts
from tests.kv.test_row_attention import config_of


def model_of(family: str) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config_of(family, 2, 32, None)).double().eval()


def at_output(attention: nn.Module, values: torch.Tensor, queries: int) -> torch.Tensor:
    """What each query head adds to the output where it looks at one token alone, ``[B, T, query heads, hidden]``."""
    shared = values.repeat_interleave(queries // values.shape[1], 1).transpose(1, 2)  # [B, T, query heads, D]
    module: Any = next(getattr(attention, name) for name in ("o_proj", "c_proj") if hasattr(attention, name))
    alone = torch.diag_embed(torch.ones(queries, dtype=values.dtype))[:, :, None] * shared[:, :, None]
    return module(alone.flatten(3)) - module(torch.zeros_like(alone.flatten(3)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_distance_is_that_at_the_output_of_attention(family: str) -> None:
    model = model_of(family)
    shape, roots = KVShape.from_config(model.config), output_roots(model, model.config)
    draw = torch.Generator().manual_seed(1)
    size = (2, shape.num_key_value_heads, 5, shape.head_dim)
    ratios = []
    for layer, attention in enumerate(attention_modules(model)):
        one, other = (torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(2))
        expected = at_output(attention, one, shape.num_attention_heads) - at_output(
            attention, other, shape.num_attention_heads
        )
        found = [in_output_metric((values,), [roots[layer]])[0] for values in (one, other)]
        ratios.append((found[0] - found[1]).square().sum((1, 3)) / expected.square().sum((2, 3)))
    for ratio in ratios:  # a constant of the layer, the unit
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)
    weights = [root @ root.mT for root in roots]
    assert all(abs(float(gram.diagonal(dim1=1, dim2=2).mean()) - 1) < 1e-5 for gram in weights)


def test_the_loss_of_an_aligner_is_the_error_at_the_output() -> None:
    model = model_of("llama")
    shape, roots = KVShape.from_config(model.config), output_roots(model, model.config)
    aligner = build_aligner(shape, shape, both_parts(alignment_mode="flat", kv_parts="v")).double()
    [part] = aligner.parts.values()
    draw = torch.Generator().manual_seed(2)
    size = (3, shape.num_key_value_heads, 4, shape.head_dim)
    student, teacher = (
        tuple(torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(2)) for _ in range(2)
    )
    metric = torch.stack([torch.block_diag(*root) for root in roots])  # [L, H·D, H·D]
    with torch.no_grad():
        plain = torch.randn(metric.shape, generator=draw, dtype=torch.float64)
        part.weight.copy_(plain @ metric)  # a map of values, and the factor
        selection = Selection(None, torch.ones(3, 4, dtype=torch.bool))
        found = aligner(KVStates((), student), KVStates((), in_output_metric(teacher, roots)), selection).value_layers
        for layer, attention in enumerate(attention_modules(model)):
            mapped = (student[layer].transpose(1, 2).flatten(2) @ plain[layer]).unflatten(2, size[1::2]).transpose(1, 2)
            outputs = [at_output(attention, v, shape.num_attention_heads) for v in (mapped, teacher[layer])]
            unit = (in_output_metric((teacher[layer],), [roots[layer]])[0].square().sum()
                    / at_output(attention, teacher[layer], shape.num_attention_heads).square().sum())  # fmt: skip
            expected = unit * (outputs[0] - outputs[1]).square().sum() / teacher[layer].numel()
            torch.testing.assert_close(found[layer], expected, rtol=1e-4, atol=0)


def test_an_attention_without_an_output_projection_is_told() -> None:
    model = model_of("llama")
    for attention in attention_modules(model):
        del attention.o_proj
    with pytest.raises(InputError, match="value_metric=output: the attention of model_type=llama has no output"):
        output_roots(model, model.config)
