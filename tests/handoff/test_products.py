"""The products of a map are the same by every way; on a GPU the fused operation does them where its kernel fits."""

import pytest
import torch

from kvds.errors import InputError
from kvds.handoff import products
from kvds.handoff.cache_map import CacheMap, source_layers
from kvds.handoff.model import HandoffModel
from kvds.handoff.products import Run, even_runs, heads_side_by_side, map_layers
from kvds.kv import KVShape
from tests.handoff.pairs import VOCAB, model_of

SOURCES = {
    "one": [[0], [2], [2], [4]],
    "windows": [[0, 1], [0, 1], [1, 2], [2, 3]],
    "uneven": [[3, 4], [0, 1], [2, 3], [3, 4]],
    "all": [[0, 1, 2, 3, 4]] * 4,
    "apart": [[0, 2], [1, 2], [4, 3], [0, 4]],
}


def inputs_of(sources, dtype, *, heads=3, dim=4, width=10):
    """Layers as a capture gives them, ``[B, T, H, D]`` in memory, and a map; all with gradients."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 7, heads, dim, generator=generator, dtype=dtype).transpose(1, 2) for _ in range(5)]
    weight = torch.randn(4, len(sources[0]) * heads * dim, width, generator=generator, dtype=dtype)
    bias = torch.randn(4, width, generator=generator, dtype=dtype)
    return [layer.requires_grad_() for layer in layers], weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("impl", ["auto", "batched", "lean", "triton"])
@pytest.mark.parametrize("name", SOURCES)
def test_every_way_gives_the_sum_over_source_layers_and_its_gradients(name: str, impl: str) -> None:
    sources = SOURCES[name]
    layers, weight, bias = inputs_of(sources, torch.float32 if impl == "triton" else torch.float64)
    found = map_layers(layers, sources, weight, bias, 2, impl=impl)
    rows = [heads_side_by_side(layer) for layer in layers]
    expected = []
    for i, read in enumerate(sources):
        blocks = weight[i].unflatten(0, (len(read), -1))
        out = sum(rows[layer] @ block for layer, block in zip(read, blocks, strict=True)) + bias[i]
        expected.append(out.unflatten(-1, (2, 5)).transpose(1, 2))
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    if impl == "triton":
        return  # its gradients are tested where it lives
    leaves = [*layers, weight, bias]
    upstream = [torch.randn_like(layer) for layer in expected]
    mine, wanted = (torch.autograd.grad(outs, leaves, upstream, allow_unused=True) for outs in (found, expected))
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(torch.zeros(()) if a is None else a + 0.0, torch.zeros(()) if b is None else b)


def test_runs_move_on_evenly() -> None:
    assert list(even_runs(SOURCES["windows"])) == [Run(0, 2, 0), Run(2, 4, 1)]
    assert list(even_runs(SOURCES["uneven"])) == [Run(0, 1, 0), Run(1, 3, 2), Run(3, 4, 0)]
    assert list(even_runs(SOURCES["all"])) == [Run(0, 4, 0)]
    assert [run.end - run.begin for run in even_runs(source_layers(24, 28, 4))] == [2, 4, 6, 6, 5, 1]


def test_an_unknown_way_is_refused() -> None:
    layers, weight, bias = inputs_of(SOURCES["one"], torch.float32)
    with pytest.raises(InputError, match="impl=quick: expected auto, batched, or one of auto"):
        map_layers(layers, SOURCES["one"], weight, bias, 2, impl="quick")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("count", "fused"), [(1, True), (2, True), (3, False)])
def test_on_a_gpu_the_fused_operation_fills_the_cache_where_it_fits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, count: int, fused: bool
) -> None:
    """A real handoff of a tiny pair, 64 numbers per layer and token: up to two layers fit one head of the kernel."""
    calls, fused_operation = [], products.map_projection

    def counted(*arguments, **options):
        calls.append(options["impl"])
        return fused_operation(*arguments, **options)

    monkeypatch.setattr(products, "map_projection", counted)
    teacher = model_of("qwen2", seed=1, layers=4, heads=4, groups=2, dim=32).to("cuda", dtype)
    student = model_of("llama", seed=2, layers=3, heads=4, groups=2, dim=16).to("cuda", dtype)
    shapes = KVShape.from_config(teacher.config), KVShape.from_config(student.config)
    cache_map = CacheMap(*shapes, source_layers(3, 4, count))
    generator = torch.Generator().manual_seed(0)
    for parameter in cache_map.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    handoff = HandoffModel(teacher, student, cache_map)
    ids = torch.randint(2, VOCAB, (3, 40), generator=generator).cuda()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :9] = False
    found = handoff.read(ids, mask)
    assert len(calls) == (2 if fused else 0)
    forward = cache_map.forward
    monkeypatch.setattr(cache_map, "forward", lambda states: forward(states, impl="batched"))
    plain = handoff.read(ids, mask)
    assert len(calls) == (2 if fused else 0)
    cache_map.double()
    monkeypatch.setattr(
        cache_map,
        "forward",
        lambda states: forward(type(states)(*([x.double() for x in p] for p in states)), impl="batched"),
    )
    exact = handoff.read(ids, mask)

    def error(states):
        pairs = [
            (x.double(), y)
            for part, wanted in zip(states, exact, strict=True)
            for x, y in zip(part, wanted, strict=True)
        ]
        return float(torch.stack([(x - y).norm() / y.norm() for x, y in pairs]).max())

    assert error(found) < max(1.1 * error(plain), torch.finfo(dtype).eps)
    monkeypatch.undo()
    cache_map.to(dtype)
    written = handoff.generate(ids, mask.long(), max_new_tokens=4, do_sample=False)
    assert written.shape == (3, 44)
