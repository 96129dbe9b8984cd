"""The Triton implementation on a GPU: rounding beside eager's, memory, determinism, addresses beyond 2^31 elements.

    python -m pytest tests/ops/test_gpu.py -m gpu

It needs torch, triton and pytest, and nothing else of this project than ``kvds.ops``. An *error* here is
``‖got − oracle‖ / ‖oracle‖`` (Frobenius) of one output: the losses, or the gradients of all layers or of one map. The
oracle is the einsum in fp64 on the same inputs: states of 16 bits, maps in fp32, which implementations round inside.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from kvds.ops import map_projection, map_projection_loss
from tests.harness.gpu_problems import (
    FROBENIUS,
    MAPS,
    PAIRS,
    SCALED,
    assert_rounds_like_eager,
    errors,
    make,
    run,
    watchdog,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted: run these alone, with -m gpu"
    ),
]


__all__ = ["watchdog"]  # a fixture of every test here


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("direction", ["student_to_teacher", "teacher_to_student"])
@pytest.mark.parametrize("pair", PAIRS)
def test_bf16_pairs_as_the_aligner_asks(pair: str, direction: str, sparse: bool) -> None:
    """The student moves in both directions: it is the source of one and the target of the other."""
    student, teacher = PAIRS[pair]
    if direction == "student_to_teacher":
        assert_rounds_like_eager(make(student, teacher, sparse=sparse), moves="source")
    else:
        assert_rounds_like_eager(make(teacher, student, sparse=sparse), moves="target")


@pytest.mark.parametrize("moves", ["source", "target"])
@pytest.mark.parametrize(
    ("pair", "head_form", "dim_form"), [("qwen2", 2, 2), ("qwen2", 3, 3), ("gqa", 2, 2), ("mha", 3, 2)]
)
def test_bf16_shared_maps(pair: str, head_form: int, dim_form: int, moves: str) -> None:
    student, teacher = PAIRS[pair]
    source, target = (student, teacher) if moves == "source" else (teacher, student)
    assert_rounds_like_eager(make(source, target, head_form=head_form, dim_form=dim_form), moves=moves)


@pytest.mark.parametrize("dim_form", [2, 4])
@pytest.mark.parametrize("moves", ["source", "target"])
def test_fp16_under_a_loss_scale(moves: str, dim_form: int) -> None:
    student, teacher = PAIRS["qwen2"]
    source, target = (student, teacher) if moves == "source" else (teacher, student)
    p = make(source, target, torch.float16, dim_form=dim_form, head_form=2)
    assert_rounds_like_eager(p, moves=moves, upstream=SCALED[torch.float16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ["smooth_l1", "l1"])
def test_other_losses(loss: str, dtype: torch.dtype) -> None:
    p = make(*PAIRS["qwen2"], dtype, dim_form=2, head_form=2)
    # A residual smaller than its rounding error takes either sign: l1's gradients are off by 2 there, in eager too.
    assert_rounds_like_eager(
        p, FROBENIUS if loss == "smooth_l1" else None, moves="both", loss=loss, upstream=SCALED[dtype]
    )


@pytest.mark.parametrize(
    "shape",
    [
        {"source": (3, 2, 64), "target": (4, 2, 128)},
        {"source": (3, 2, 64), "target": (4, 2, 128), "dim_form": 2, "head_form": 2},
        {"source": (1, 1, 16), "target": (1, 1, 16), "tokens": 1, "slots": None, "batch": 1, "masked": 0.0},
        {"source": (1, 1, 16), "target": (1, 1, 16), "tokens": 1, "slots": None, "masked": 0.0, "dim_form": 2},
        {"source": (1, 1, 80), "target": (1, 2, 96), "tokens": 3, "slots": 1, "masked": 0.0, "sparse": True},
    ],
    ids=lambda shape: "x".join(map(str, (*shape["source"], *shape["target"]))),
)
def test_fp32_states_are_not_multiplied_in_tf32(shape: dict) -> None:
    p = make(dtype=torch.float32, **shape)
    oracle = run(p, "reference", wide=True, moves="both")
    found = errors(run(p, "triton", moves="both"), oracle)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(
    "shape",
    [
        {"source": (3, 2, 80), "target": (2, 3, 96)},
        {"source": (3, 2, 96), "target": (2, 3, 80), "dim_form": 2, "head_form": 2},
        {"source": (2, 64, 32), "target": (3, 1, 16), "dim_form": 3},
        {"source": (5, 1, 16), "target": (2, 64, 128), "tokens": 33, "slots": None, "token_major": False},
        {"source": (80, 1, 16), "target": (3, 4, 48), "dim_form": 2, "bias": False, "scale": False},
    ],
    ids=lambda shape: "x".join(map(str, (*shape["source"], *shape["target"]))),
)
def test_shapes(shape: dict) -> None:
    assert_rounds_like_eager(make(**shape), moves="both")


def test_nothing_valid_is_zero_with_a_graph() -> None:
    empty = make((3, 2, 64), (2, 2, 64), slots=0, masked=0.0)
    hidden = make((3, 2, 64), (2, 2, 64), masked=1.1)
    for p in (empty, hidden):
        out = run(p, "triton", moves="both")
        assert all((value == 0).all() for value in out.values())


def test_what_the_mask_hides_is_never_used() -> None:
    p = make((5, 2, 64), (4, 2, 128), slots=None)
    clean = run(p, "triton", moves="both")
    for side in ("source", "target"):
        for layer in p[side]:
            layer.masked_fill_(~p["mask"][:, None, :, None], float("nan"))
    poisoned = run(p, "triton", moves="both")
    assert all(torch.equal(clean[name], poisoned[name]) for name in clean)


@pytest.mark.parametrize(
    "form", [{"dim_form": 2, "head_form": 2}, {}, {"sparse": True}], ids=["fused", "dense", "pairs"]
)
def test_two_runs_agree_to_the_bit(form: dict) -> None:
    p = make(*PAIRS["qwen2"], tokens=1000, slots=937, **form)
    first, second = (run(p, "triton", moves="both") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "form",
    [{}, {"dim_form": 2, "head_form": 2, "sparse": True}, {"dim_form": 2, "head_form": 3}],
    ids=["per row", "sparse and shared", "fused"],
)
def test_what_one_call_asks_for_is_not_launched_for_the_next(form: dict) -> None:
    """Calls that differ in nothing but the gradients that they want, in every order of two."""
    p = make(*PAIRS["qwen2"][::-1], **form)
    oracle = run(p, "reference", wide=True)["losses"]
    for moves in ("target", "both", "source", "target"):
        assert_rounds_like_eager(p, None, moves=moves)
        with torch.no_grad():
            total, per_layer = map_projection_loss(**p, impl="triton")
            map_projection(**{name: p[name] for name in ("source", *MAPS, "source_index")}, impl="triton")
        found = torch.cat([total[None], per_layer]).double()
        assert float((found - oracle).norm() / oracle.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_kept_graph_answers_twice_and_scales_with_its_upstream(dtype: torch.dtype) -> None:
    p = make((5, 2, 64), (4, 2, 128), dtype)
    leaves = [p["source"][0].requires_grad_(), p["dim_proj"].requires_grad_()]
    total, _ = map_projection_loss(**p, impl="triton")
    first = torch.autograd.grad(total * 4096, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(total * 8192, leaves)
    for handed_out, copy, twice in zip(first, kept, second, strict=True):
        assert torch.equal(handed_out, copy)
        # A power of two leaves the mantissa alone, except where fp16 is subnormal.
        assert torch.allclose(2 * handed_out.float(), twice.float(), rtol=0, atol=2e-7 if dtype == torch.float16 else 0)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_projection_alone(sparse: bool) -> None:
    p = make(*PAIRS["qwen2"], sparse=sparse)
    arguments = {name: p[name] for name in ("source", *MAPS, "source_index")}
    upstream = torch.randn(28, 2, 2, 131, 128, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    upstream = upstream.bfloat16()

    def outputs(impl: str, wide: bool) -> dict[str, torch.Tensor]:
        cast: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double if wide else torch.Tensor.clone
        source = [cast(t).detach().requires_grad_() for t in arguments["source"]]
        maps = {name: cast(arguments[name]).detach().requires_grad_() for name in MAPS}
        out = map_projection(source, **maps, source_index=p["source_index"], impl=impl)
        gradients = torch.autograd.grad(out, [*source, *maps.values()], upstream.to(out.dtype))
        found = {"out": out.detach(), "source": torch.stack(gradients[: len(source)])}
        return found | dict(zip(MAPS, gradients[len(source) :], strict=True))

    oracle = outputs("reference", True)
    eager, found = errors(outputs("reference", False), oracle), errors(outputs("triton", False), oracle)
    assert all(found[name] <= min(FROBENIUS, 2 * eager[name] + 1e-5) for name in found), (found, eager)


@pytest.mark.parametrize("tokens", [1, 37, 2048])
@pytest.mark.parametrize("dim_form", [2, 4], ids=["shared", "per_head"])
def test_projection_without_gradients(dim_form: int, tokens: int) -> None:
    """What a handoff calls: no autograd node, and as many programs as there are tiles."""
    p = make(*PAIRS["qwen2"][::-1], tokens=tokens, slots=None, masked=0.0, dim_form=dim_form, head_form=2)
    names = ("source", *MAPS)
    found = {}
    with torch.no_grad():
        for name, wide in (("oracle", True), ("reference", False), ("triton", False)):
            cast = {k: [t.double() for t in p[k]] if k == "source" else p[k].double() for k in names} if wide else p
            impl = "triton" if name == "triton" else "reference"
            found[name] = {"out": map_projection(**{k: cast[k] for k in names}, impl=impl)}
    eager, got = errors(found["reference"], found["oracle"]), errors(found["triton"], found["oracle"])
    assert got["out"] <= min(FROBENIUS, 2 * eager["out"] + 1e-5), (got, eager)


def test_auto_is_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvds.ops import triton_compute

    called = []
    for name in ("compute_triton", "map_projection_triton"):
        original = getattr(triton_compute, name)
        monkeypatch.setattr(
            triton_compute, name, lambda *a, name=name, original=original: (called.append(name), original(*a))[1]
        )
    p = make((3, 2, 64), (2, 2, 128))
    map_projection_loss(**p)
    map_projection(p["source"], p["layer_mix"], p["head_mix"], p["dim_proj"])
    assert called == ["compute_triton", "map_projection_triton"]
    wide = make((3, 2, 256), (2, 2, 256))
    run(wide, "auto")  # no kernel takes head_dim 256
    assert len(called) == 2


def test_the_host_never_waits() -> None:
    p = make(*PAIRS["qwen2"])
    run(p, "triton")  # compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(p, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compile_generates_code_for_the_oracle() -> None:
    p = make((3, 2, 64), (2, 2, 128), torch.float32)
    oracle = run(p, "reference", wide=True)
    assert max(errors(run(p, "compile"), oracle).values()) < 1e-2  # torch may multiply in tf32


def extra_memory(problem: dict, impl: str, moves: str) -> int:
    """Bytes that a forward and backward pass needs beyond what was there before and beyond the gradients it returns."""
    moving = [t.detach().requires_grad_() for t in problem[moves]]
    maps = {name: problem[name].detach().requires_grad_() for name in MAPS if name in problem}
    arguments = problem | {moves: moving} | maps
    returned = sum(t.numel() * t.element_size() for t in [*moving, *maps.values()])
    for _ in range(2):  # the first one compiles, and fills what is cached for good
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        total, _ = map_projection_loss(**arguments, impl=impl)
        gradients = torch.autograd.grad(total, [*moving, *maps.values()])
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        assert all(g is not None for g in gradients)
        del total, gradients
    return peak - before - returned


@pytest.mark.parametrize(
    ("form", "share"),
    [({"dim_form": 2, "head_form": 2}, 0.02), ({}, 0.03), ({"sparse": True}, 0.03)],
    ids=["fused", "dense", "pairs"],
)
@pytest.mark.parametrize("moves", ["source", "target"])
def test_extra_memory_is_two_or_three_percent_of_eager(moves: str, form: dict, share: float) -> None:
    student, teacher = PAIRS["qwen2"]
    source, target = (student, teacher) if moves == "source" else (teacher, student)
    p = make(source, target, batch=8, tokens=4096, slots=None, masked=0.1, **form)
    if form.get("sparse"):  # layers chosen twice: each use is a leaf of its own here, whose gradient is returned
        p["source"] = [t.clone(memory_format=torch.preserve_format) for t in p["source"]]
    eager = extra_memory(p, "reference", moves)
    found = extra_memory(p, "triton", moves)
    print(f"extra memory: triton {found / 2**20:.1f} MiB, eager {eager / 2**20:.1f} MiB, {found / eager:.2%}")
    assert found <= share * eager


@pytest.mark.parametrize("dim", [128, 64], ids=["plain", "fused"])
@pytest.mark.parametrize("token_major", [True, False], ids=["captured", "contiguous"])
@pytest.mark.parametrize("indexed", [False, True], ids=["all", "indexed"])
def test_more_than_two_to_the_31_elements(token_major: bool, indexed: bool, dim: int) -> None:
    """2.7e9 elements a source layer, in the batch stride, the token stride and the gradient's buffer alike."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    batch, heads, tokens = 2, 1024 // dim, 1_310_721
    shape = (batch, tokens, heads, dim) if token_major else (batch, heads, tokens, dim)

    def states(layers: int, h: int, d: int, value: float) -> list[torch.Tensor]:
        size = (batch, tokens, h, d) if token_major else (batch, h, tokens, d)
        made = [torch.full(size, value * (i + 1), dtype=torch.bfloat16, device="cuda") for i in range(layers)]
        return [t.transpose(1, 2) if token_major else t for t in made]

    assert torch.Size(shape).numel() > 2**31
    g = torch.Generator("cuda").manual_seed(0)
    dim_y = 192 - dim
    source, target = states(2, heads, dim, 0.5), states(1, 2, dim_y, 0.25)
    # Rows at both ends and around the boundaries of 2^31 elements and bytes differ from the rest.
    places = torch.tensor([0, 1, 1_048_575, 1_048_576, 1_048_577, tokens - 2, tokens - 1], device="cuda")
    for layer in (*source, *target):
        layer[:, :, places] = torch.randn(
            batch, layer.shape[1], len(places), layer.shape[3], device="cuda", generator=g
        ).bfloat16()
    maps = {
        "layer_mix": torch.randn(1, 2, device="cuda", generator=g),
        "head_mix": torch.randn(2, heads, device="cuda", generator=g) / heads**0.5,
        "dim_proj": torch.randn(dim, dim_y, device="cuda", generator=g) / dim**0.5,
    }
    small = {
        side: [t[:, :, places].clone() for t in layers] for side, layers in (("source", source), ("target", target))
    }
    index = places.expand(batch, -1).contiguous()
    leaves = [t.requires_grad_() for t in source]
    if indexed:
        total, _ = map_projection_loss(source, target, **maps, source_index=index, target_index=index, impl="triton")
        expected = run({**small, **maps}, "reference", wide=True)
        share = 1.0
    else:
        total, _ = map_projection_loss(source, target, **maps, impl="triton")
        with torch.no_grad():
            every, _ = map_projection_loss(source, target, **maps, impl="lean")
        assert float(total.detach()) == pytest.approx(float(every), rel=5e-3)
        expected = run({**small, **maps}, "reference", wide=True)
        share = len(places) / tokens  # of the mean over all tokens, for the gradient of one
    gradients = torch.autograd.grad(total, leaves)
    got = torch.stack([layer[:, :, places] for layer in gradients]).double()
    want = expected["source"] * share
    assert float((got - want).norm() / want.norm()) < FROBENIUS
    if indexed:
        assert float(total.detach()) == pytest.approx(float(expected["losses"][0]), rel=5e-3)
        for layer in gradients:  # and nothing was written elsewhere
            assert sum(int(head.count_nonzero()) for head in layer.unbind(1)) <= batch * heads * len(places) * dim
