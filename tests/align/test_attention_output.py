"""The error of the attention output is that of the model's own attention, run again on projected keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvds.align import build_aligner
from kvds.align.attention_output import AttentionOutputError
from kvds.align.fitting import fit_aligner
from kvds.data.batches import TokenBatch
from kvds.data.model_inputs import unpacked
from kvds.distillation.calibration import attention_output_of_batch
from kvds.kv import KVCapture, KVShape, KVStates, Selection, select_tokens
from kvds.kv.attention_chunks import attention_chunks
from kvds.kv.attention_layout import output_projection
from kvds.kv.families import attention_layouts, attention_modules, backbone
from kvds.teacher.output_metric import output_roots
from kvds.teacher.teacher import Teacher
from tests.harness.kv_settings import both_parts
from tests.kv.test_row_attention import model_of, padded
from tests.kv.test_row_attention import packed as packed_rows

CPU = torch.device("cpu")


def packed() -> TokenBatch:
    return packed_rows(capacity=60, one_row=True)


def choose(batch: TokenBatch, observed: Any) -> Selection:
    return select_tokens("uniform", 0.5, batch.segment_ids, batch.attention_mask)


def outputs(model: Any, batch: TokenBatch, layer: int, patches: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """``[real tokens, hidden]`` that transformers' own attention of a layer gives, with ``patches`` at ``chosen``."""
    layout, attention = attention_layouts(model)[layer], attention_modules(model)[layer]
    projection: Any = output_projection(attention)
    seen: list[Tensor] = []
    handles = [projection.register_forward_hook(lambda _m, args, out: seen.append(args[0]))]
    for part, born in (("key", layout.key), ("value", layout.value)):
        if part not in patches:
            continue

        def patched(_m: Any, _a: Any, out: Tensor, born: Any = born, rows: Tensor = patches[part]) -> Tensor:
            out = out.clone()
            heads = born.heads(out).transpose(1, 2)  # a view
            heads[chosen] = rows
            return out

        handles.append(born.module.register_forward_hook(patched))
    with torch.no_grad():
        backbone(model)(input_ids=batch.input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        return (projection(seen[0]) - projection(0 * seen[0]))[batch.attention_mask.bool()]


def shaken(aligner: Any) -> Any:
    """The aligner in fp64 with other units, means and biases than those of a start."""
    draw = torch.Generator().manual_seed(4)
    for tensor in (*aligner.double().parameters(), *aligner.buffers()):
        with torch.no_grad():
            tensor += 0.3 * torch.rand(tensor.shape, generator=draw, dtype=tensor.dtype)
    return aligner


CASES = [
    ("llama", None, {"alignment_mode": "flat", "kv_parts": "v"}),
    ("llama", None, {"alignment_mode": "flat", "kv_parts": "v", "direction": "teacher_to_student"}),
    ("qwen2", 4, {"alignment_mode": "structured", "kv_parts": "kv"}),
    ("qwen2", None, {"alignment_mode": "structured", "kv_parts": "v", "value_metric": "output"}),
    ("gemma2", 4, {"alignment_mode": "structured", "kv_parts": "k", "layer_map": "last_aligned"}),
    ("gpt2", None, {"alignment_mode": "structured", "kv_parts": "kv", "map_proj_share_dim": True}),
]


@pytest.mark.parametrize("rows", [padded, packed])
@pytest.mark.parametrize(("family", "window", "asked"), CASES)
def test_the_error_is_that_of_the_models_own_attention(family: str, window: Any, asked: Any, rows: Any) -> None:
    student, teacher = (model_of(family, n, 32, n, window, "eager").double().eval() for n in (2, 3))
    for attention in attention_modules(teacher):
        projection: Any = output_projection(attention)
        if projection.bias is not None:
            torch.nn.init.ones_(projection.bias)
    shapes = [KVShape.from_config(model.config) for model in (student, teacher)]
    aligner = shaken(build_aligner(*shapes, both_parts(**asked)))
    metric = asked.get("value_metric", "states")
    runs = Teacher(teacher, device=CPU, value_metric=metric)
    error = attention_output_of_batch(aligner, student, runs, rows(), choose, rope="pre")
    assert error is not None and student.training is False
    found = error.result()

    batch = unpacked(rows())
    selection = choose(batch, None)
    chosen = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    for row, (index, mask) in enumerate(zip(selection.index, selection.mask, strict=True)):  # type: ignore[arg-type]
        chosen[row, index[mask]] = True
    states = []
    for model in (student, teacher):
        with torch.no_grad(), KVCapture(backbone(model)) as capture:
            backbone(model)(input_ids=batch.input_ids, use_cache=False)
        states.append(capture.states)
    to_teacher = "direction" not in asked
    source, target = (student, teacher) if to_teacher else (teacher, student)
    part: Any = next(iter(aligner.parts.values()))
    layers = range(part.num_targets) if part.pairs is None else [pair[1 if to_teacher else 0] for pair in part.pairs]
    assert len(found["cosine"]) == len(layers)
    for place, layer in enumerate(layers):
        patches = {}
        for name, part in aligner.parts.items():
            x, _ = part.sides(*(getattr(side, f"{name}s") for side in states))
            with torch.no_grad():
                patches[name] = part.projected(torch.stack([one.transpose(1, 2)[chosen] for one in x]))[place]
        if metric == "output":
            inverse = torch.linalg.inv(output_roots(teacher, teacher.config)[layer])
            patches["value"] = torch.einsum("nhd,hde->nhe", patches["value"], inverse)
        wanted = outputs(target, batch, layer, {}, chosen)
        other = outputs(target, batch, layer, patches, chosen)
        expected = (other - wanted).square().sum() / wanted.square().sum()
        assert found["relative_error"][place] == pytest.approx(float(expected), rel=1e-5) and expected > 1e-4
        cosine = torch.cosine_similarity(other, wanted, dim=-1).mean()
        assert found["cosine"][place] == pytest.approx(float(cosine), rel=1e-5)
    assert source is not target


@pytest.mark.parametrize("mode", ["flat", "structured", "hidden"])
@pytest.mark.parametrize("share", [False, True])
def test_projected_states_are_those_that_the_loss_compares(mode: str, share: bool) -> None:
    student, teacher = KVShape(2, 2, 3, 4, 5), KVShape(3, 4, 6, 4, 7)
    settings = both_parts(alignment_mode=mode, map_proj_share_dim=share and mode != "flat")
    aligner = shaken(build_aligner(student, teacher, settings))
    part: Any = next(iter(aligner.parts.values()))
    draw = torch.Generator().manual_seed(1)
    shape = part.source_shape
    size = (2, shape.num_key_value_heads, 4, shape.head_dim)
    states = tuple(torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(2))
    like = part.target_shape
    blank = tuple(states[0].new_zeros(2, like.num_key_value_heads, 4, like.head_dim) for _ in range(3))
    source, _ = part.sides(states, blank)
    mask = torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad():
        rows = part.projected(torch.stack([layer.transpose(1, 2).flatten(0, 1) for layer in source]))
        made = [layer.unflatten(0, (2, 4)).transpose(1, 2) for layer in rows]
        target = list(blank)
        for place, layer in enumerate(made):
            target[place if part.pairs is None else part.pairs[place][1]] = layer + 0.5
        _, losses = part(states, tuple(target), None, mask)
    torch.testing.assert_close(losses, (0.5 / part.target_scale).square().to(losses), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_a_map_that_finds_all_leaves_the_output(rope: str) -> None:
    model = model_of("llama", 2, 32, 1, None, "eager").double().eval()
    shape = KVShape.from_config(model.config)
    settings = both_parts(alignment_mode="flat", kv_parts="kv", map_start="ridge", kv_rope=rope)
    aligner = build_aligner(shape, shape, settings).double()
    for part in aligner.parts.values():
        with torch.no_grad():
            part.weight.copy_(torch.eye(part.weight.shape[1]).expand_as(part.weight))
    teacher = Teacher(model, device=CPU, rope=rope)
    error = attention_output_of_batch(aligner, model, teacher, padded(), choose, rope=rope)
    assert error is not None
    assert error.result()["relative_error"] == pytest.approx([0, 0], abs=1e-12)
    assert error.result()["cosine"] == pytest.approx([1, 1])


def test_what_has_no_attention_output_is_not_measured() -> None:
    student, teacher = (model_of("llama", n, 32, n, None, "eager") for n in (2, 3))
    shapes = [KVShape.from_config(model.config) for model in (student, teacher)]
    runs = Teacher(teacher, device=CPU)
    for mode in ("hidden", "relation", "structural_kv"):
        aligner = build_aligner(*shapes, both_parts(alignment_mode=mode))
        assert attention_output_of_batch(aligner, student, runs, padded(), choose, rope="pre") is None
    aligner = build_aligner(*shapes, both_parts())

    def nothing(batch: TokenBatch, observed: Any) -> Selection:
        return Selection(None, torch.zeros_like(batch.attention_mask, dtype=torch.bool))

    error = attention_output_of_batch(aligner, student, runs, padded(), nothing, rope="pre")
    assert error is not None and error.result() == {}
    for attention in attention_modules(teacher):
        del attention.o_proj
    assert not AttentionOutputError.measures(aligner, teacher)


@pytest.mark.parametrize("elements", [1, 200, 10**9])
def test_chunks_of_attention_are_the_whole(elements: int) -> None:
    model = model_of("qwen2", 2, 32, 1, 4, "eager").double().eval()
    batch = padded()
    real = batch.attention_mask.bool()
    with torch.no_grad(), KVCapture(backbone(model), query_rows="all") as capture:
        whole = backbone(model)(input_ids=batch.input_ids, use_cache=False, output_attentions=True).attentions
    for layer, expected in zip(capture.observed, whole, strict=True):
        seen = 0
        for asking, weights in attention_chunks(layer, real, elements=elements):
            found = weights.flatten(1, 2).transpose(1, 2)  # [B, asking, heads, stop]
            rest = expected.transpose(1, 2)[:, asking]
            own = real[:, asking]
            assert asking.start == seen and not rest[own][..., weights.shape[-1] :].any()
            seen = asking.stop
            torch.testing.assert_close(found[own], rest[..., : weights.shape[-1]][own], rtol=1e-5, atol=1e-7)
            assert not found[~own].any()
        assert seen == real.shape[1]


def test_sums_of_batches_are_those_of_one() -> None:
    student, teacher = (model_of("llama", n, 32, n, None, "eager").double().eval() for n in (2, 3))
    shapes = [KVShape.from_config(model.config) for model in (student, teacher)]
    aligner = build_aligner(*shapes, both_parts(map_start="ridge")).double()
    batch = padded()
    everything = select_tokens("full", None, batch.segment_ids, batch.attention_mask)
    found = []
    for parts in ([slice(0, 6)], [slice(0, 2), slice(2, 6)]):
        error = AttentionOutputError(aligner, teacher)
        for rows in parts:
            inputs = {"input_ids": batch.input_ids[rows], "attention_mask": batch.attention_mask[rows]}
            with torch.no_grad(), error.watch() as watched, KVCapture(backbone(student)) as own:
                backbone(student)(**inputs, use_cache=False)
                backbone(teacher)(**inputs, use_cache=False)
            both: list[KVStates] = [own.states, KVStates(*watched.states)]
            selection = Selection(None, everything.mask[rows])
            if not found and len(parts) == 1:
                fit_aligner(aligner, [(*both, selection)])
            error.update(*both, watched, selection, batch.attention_mask[rows].bool())
        found.append(error.result())
    for measure, values in found[0].items():
        assert found[1][measure] == pytest.approx(values, rel=1e-9)
    assert all(0 < value < 1 for value in found[0]["relative_error"])
