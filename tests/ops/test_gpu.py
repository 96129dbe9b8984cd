"""The Triton implementation on a GPU: rounding beside eager's, memory, determinism, addresses beyond 2^31 elements.

    python -m pytest tests/ops/test_gpu.py -m gpu

It needs torch, triton and pytest, and nothing else of this project than ``kvds.ops``. An *error* here is
``‖got − oracle‖ / ‖oracle‖`` (Frobenius) of one output: the losses, or the gradients of all layers or of one map. The
oracle is the einsum in fp64 on the same inputs: states of 16 bits, maps in fp32, which implementations round inside.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from kvds.ops import map_projection, map_projection_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted: run these alone, with -m gpu"
    ),
]


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """Roles of a kernel that wait for one another for ever keep the interpreter in a call from which no signal and no
    other thread of Python gets it: faulthandler's own thread ends the process."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


MAPS = ("layer_mix", "head_mix", "dim_proj", "bias")
FROBENIUS = 5e-3
"""The largest error of any output in bf16 and fp16."""

# (layers, KV heads, head_dim) of the student, then of the teacher.
PAIRS = {
    "qwen2": ((24, 2, 64), (28, 2, 128)),
    "mha": ((16, 16, 64), (32, 32, 128)),
    "gqa": ((32, 8, 64), (80, 8, 128)),
}


def make(
    source: tuple[int, int, int],
    target: tuple[int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    batch: int = 2,
    tokens: int = 150,
    slots: int | None = 131,
    masked: float = 0.3,
    sparse: bool = False,
    head_form: int = 3,
    dim_form: int = 4,
    token_major: bool = True,
    bias: bool = True,
    scale: bool = True,
    seed: int = 0,
) -> dict:
    """A random problem on the GPU; by default as the structured aligner asks it, with the strides of captured keys."""
    g = torch.Generator("cuda").manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    def states(layers: int, heads: int, dim: int) -> list[torch.Tensor]:
        if token_major:
            return [rand(batch, tokens, heads, dim).to(dtype).transpose(1, 2) for _ in range(layers)]
        return [rand(batch, heads, tokens, dim).to(dtype) for _ in range(layers)]

    (lx, hx, dx), (ly, hy, dy) = source, target
    problem = {"source": states(lx, hx, dx), "target": states(ly, hy, dy)}
    if sparse:  # an endpoint map: one source layer for each target layer
        problem["source"] = [problem["source"][(i * (lx - 1) * 2 + ly - 1) // (2 * max(ly - 1, 1))] for i in range(ly)]
        problem["layer_mix"] = 1 + 0.1 * rand(ly)
    else:
        problem["layer_mix"] = torch.softmax(rand(ly, lx), 1)
    problem["head_mix"] = rand(*(ly,)[: head_form - 2], hy, hx) / hx**0.5
    problem["dim_proj"] = rand(*(ly, hy)[: dim_form - 2], dx, dy) / dx**0.5
    if bias:
        problem["bias"] = rand(ly, hy, dy)
    if scale:
        problem["scale"] = rand(ly).abs() + 0.5
    if slots is not None:
        order = torch.rand(batch, tokens, generator=g, device="cuda").argsort(1)
        problem["source_index"] = problem["target_index"] = order[:, :slots].sort(1).values
    if masked:
        problem["mask"] = torch.rand(batch, slots or tokens, generator=g, device="cuda") >= masked
    return problem


def run(
    problem: dict, impl: str, *, wide: bool = False, moves: str = "source", loss: str = "mse", upstream: float = 1.0
) -> dict[str, torch.Tensor]:
    """Losses, and the gradients of the side that ``moves`` and of all maps. ``wide`` casts everything to fp64."""

    def leaf(value: torch.Tensor) -> torch.Tensor:
        return (value.detach().double() if wide else value.detach()).requires_grad_()

    p = dict(problem)
    if wide:
        p |= {side: [t.double() for t in problem[side]] for side in ("source", "target")}
        p |= {"scale": problem["scale"].double()} if "scale" in problem else {}
    sides = [side for side in ("source", "target") if moves in (side, "both")]
    p |= {side: [leaf(t) for t in problem[side]] for side in sides}
    moving = [t for side in sides for t in p[side]]
    maps = {name: leaf(problem[name]) for name in MAPS if name in problem}
    total, per_layer = map_projection_loss(**(p | maps), loss=loss, impl=impl)
    gradients = torch.autograd.grad(total * upstream, [*moving, *maps.values()])
    # One output: a scalar's error can be zero by luck, in one implementation and not in the other.
    out = {"losses": torch.cat([total.detach()[None], per_layer])}
    states = iter(gradients)
    out |= {side: torch.stack([next(states) for _ in p[side]]) for side in sides}
    return out | dict(zip(maps, gradients[len(moving) :], strict=True))


def errors(got: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]) -> dict[str, float]:
    assert got.keys() == oracle.keys()
    return {
        name: float((got[name].double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
        for name, want in oracle.items()
    }


def assert_rounds_like_eager(problem: dict, frobenius: float | None = FROBENIUS, **how: object) -> None:
    """Every output: at most twice eager's error in the same dtype, plus 1e-5; and within ``frobenius``."""
    oracle = run(problem, "reference", wide=True, **how)  # type: ignore[arg-type]
    eager = errors(run(problem, "reference", **how), oracle)  # type: ignore[arg-type]
    found = errors(run(problem, "triton", **how), oracle)  # type: ignore[arg-type]
    table = "\n".join(f"{name}: triton {found[name]:.2e}, eager {eager[name]:.2e}" for name in found)
    print(table)
    assert all(found[name] <= 2 * eager[name] + 1e-5 for name in found), table
    assert frobenius is None or all(error <= frobenius for error in found.values()), table


# fp16 keeps 6e-8 at least: gradients of a mean over millions of elements need the loss scale that training has.
SCALED = {torch.bfloat16: 1.0, torch.float16: 2.0**20, torch.float32: 1.0}


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


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each call that the fused kernel of compute capability 9.0 takes."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    from kvds.ops import gluon_launch

    calls: list[str] = []
    original = gluon_launch.run_fused
    monkeypatch.setattr(gluon_launch, "run_fused", lambda *a: (calls.append("fused"), original(*a))[1])
    return calls


SHARED = {"dim_form": 2, "head_form": 2}
FUSED = {
    "student to teacher": (*PAIRS["qwen2"], "source", {}),
    "teacher to student": (*PAIRS["qwen2"][::-1], "target", {}),
    "both sides": (*PAIRS["qwen2"], "both", {}),
    "target of a wide teacher": (*PAIRS["qwen2"], "target", {}),
    "nothing left out": (*PAIRS["qwen2"], "source", {"slots": None, "masked": 0.0, "bias": False, "scale": False}),
    "heads of each layer": (*PAIRS["qwen2"][::-1], "target", {"head_form": 3}),
    "heads before tokens": (*PAIRS["qwen2"], "both", {"token_major": False, "slots": None}),
    "one row": ((1, 1, 64), (1, 1, 128), "source", {}),
    "all rows": ((1, 64, 128), (64, 1, 64), "target", {"slots": None}),
    "64 to 64": ((5, 3, 64), (7, 4, 64), "both", {"head_form": 3}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ["mse", "smooth_l1", "l1"])
@pytest.mark.parametrize("case", FUSED)
def test_fused_kernel(case: str, loss: str, dtype: torch.dtype, fused_calls: list[str]) -> None:
    source, target, moves, form = FUSED[case]
    p = make(source, target, dtype, **(SHARED | form))
    # l1: as above, a residual smaller than its rounding error takes either sign.
    assert_rounds_like_eager(p, FROBENIUS if loss != "l1" else None, moves=moves, loss=loss, upstream=SCALED[dtype])
    assert fused_calls == ["fused"]


@pytest.mark.parametrize("direction", ["source", "target"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 131), (7, 19), (2, 1000), (3, 1777)])
def test_fused_kernel_with_fewer_or_more_tokens_than_programs(
    batch: int, tokens: int, direction: str, fused_calls: list[str]
) -> None:
    sides = PAIRS["qwen2"] if direction == "source" else PAIRS["qwen2"][::-1]
    p = make(*sides, batch=batch, tokens=tokens, slots=None, masked=0.3 if tokens > 1 else 0.0, **SHARED)
    assert_rounds_like_eager(p, moves=direction)
    # Poisoned memory: what a run left unwritten would show in the next.
    first = run(p, "triton", moves=direction)
    del (blocks := [torch.full((2**22,), float("nan"), device="cuda") for _ in range(4)])[:]
    second = run(p, "triton", moves=direction)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert fused_calls == ["fused"] * 3 and not blocks


@pytest.mark.parametrize("moves", ["source", "target"])
def test_fused_kernel_with_maps_that_are_frozen(moves: str, fused_calls: list[str]) -> None:
    sides = PAIRS["qwen2"] if moves == "source" else PAIRS["qwen2"][::-1]
    p = make(*sides, **SHARED)
    whole = run(p, "triton", moves=moves)
    leaves = [t.detach().requires_grad_() for t in p[moves]]
    total, _ = map_projection_loss(**(p | {moves: leaves}), impl="triton")
    assert torch.equal(torch.stack(torch.autograd.grad(total, leaves)), whole[moves])
    maps = {name: p[name].detach().requires_grad_() for name in MAPS}
    total, _ = map_projection_loss(**(p | maps), impl="triton")
    gradients = torch.autograd.grad(total, list(maps.values()))
    assert all(torch.equal(g, whole[name]) for g, name in zip(gradients, maps, strict=True))
    assert fused_calls == ["fused"] * 3


@pytest.fixture
def project_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each launch of the kernel of compute capability 9.0 for a ``dim_proj`` per row."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    from kvds.ops import gluon_launch

    calls: list[str] = []
    original = gluon_launch.launch_project
    monkeypatch.setattr(gluon_launch, "launch_project", lambda *a: (calls.append("project"), original(*a))[1])
    return calls


PER_ROW = {
    "student to teacher": (*PAIRS["qwen2"], "source", {}),
    "teacher to student": (*PAIRS["qwen2"][::-1], "target", {}),
    "both sides": (*PAIRS["qwen2"], "both", {"token_major": False}),
    "both sides back": (*PAIRS["qwen2"][::-1], "both", {}),
    "a projection per layer": (*PAIRS["qwen2"], "source", {"dim_form": 3, "slots": None}),
    "sparse": (*PAIRS["qwen2"], "source", {"sparse": True, "head_form": 2}),
    "nothing left out": (*PAIRS["qwen2"], "source", {"slots": None, "masked": 0.0, "bias": False, "scale": False}),
    "more rows than a tile": ((16, 16, 64), (9, 16, 128), "source", {}),
    "64 to 64": ((5, 3, 64), (7, 4, 64), "both", {"head_form": 2, "slots": None}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ["mse", "smooth_l1", "l1"])
@pytest.mark.parametrize("case", PER_ROW)
def test_projections_per_row(
    case: str, loss: str, dtype: torch.dtype, project_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, moves, form = PER_ROW[case]
    p = make(source, target, dtype, **form)
    assert_rounds_like_eager(p, FROBENIUS if loss != "l1" else None, moves=moves, loss=loss, upstream=SCALED[dtype])
    assert project_calls == ["project"]
    whole = run(p, "triton", moves=moves, loss=loss, upstream=SCALED[dtype])
    monkeypatch.setattr("kvds.ops.triton_plan.MAX_WORKSPACE_BYTES", 1)
    monkeypatch.setattr("kvds.ops.triton_plan.WORKSPACE_BYTES", 1)  # chunks of 64 tokens
    parts = run(p, "triton", moves=moves, loss=loss, upstream=SCALED[dtype])
    assert len(project_calls) > 3
    assert all(torch.equal(parts[side], whole[side]) for side in ("source", "target") if side in whole)
    assert max(errors(parts, whole).values()) < 1e-5


def test_what_the_fused_kernel_cannot_take_goes_to_the_plain_one(fused_calls: list[str]) -> None:
    student, teacher = PAIRS["qwen2"]
    run(make(teacher, student, **SHARED), "triton", moves="source")  # a gradient of a source wider than its target
    run(make((3, 2, 64), (2, 2, 96), **SHARED), "triton")
    p = make((3, 2, 64), (2, 2, 128), **SHARED)
    p["source"] = [torch.nn.functional.pad(t, (1, 7))[..., 1:65] for t in p["source"]]  # rows off 16 bytes
    assert_rounds_like_eager(p)
    run(make((3, 2, 64), (2, 2, 128), torch.float32, **SHARED), "triton")
    assert fused_calls == []


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
