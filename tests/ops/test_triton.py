"""The Triton implementation in Triton's interpreter (no GPU) against the fp64 oracle.

Every buffer that ``torch.empty`` or ``new_empty`` gives holds NaN first, so that what a kernel forgets to write shows.
``tests/conftest.py`` turns the interpreter on. It is slow: shapes are small, and a call takes a good part of a second.
"""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvds.errors import InputError
from kvds.ops import map_projection, map_projection_loss, triton_plan
from kvds.ops.map_projection import _choose
from tests.harness.ops_problems import LEAVES, assert_same, leaf, make, run

triton = pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are not interpreted in this session"),
    pytest.mark.skipif(
        triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
        reason="the interpreter of Triton 3.6 cannot loop to a run-time bound with numpy 2.4 or later",
    ),
]

MAPS = ("layer_mix", "head_mix", "dim_proj", "bias")
SMALL = {"layers": (2, 2), "heads": (2, 1), "tokens": 5}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    def nan(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: nan(empty(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: nan(new_empty(*args, **kwargs)))


def compare(
    p: dict, dtype: torch.dtype = torch.float64, loss: str = "mse", upstream: float = 1.0, moves: tuple = LEAVES
) -> None:
    want = run(p, "reference", torch.float64, loss, upstream, moves)
    assert_same(run(p, "triton", dtype, loss, upstream, moves), want, 1e-9 if dtype == torch.float64 else 1e-5)


@settings(max_examples=8)
@given(data=st.data())
def test_any_shape_agrees_with_the_oracle(data: st.DataObject) -> None:
    few = st.integers(1, 2)
    tokens = data.draw(st.integers(1, 9))
    p = make(
        layers=(data.draw(few), data.draw(few)),
        heads=(data.draw(st.integers(1, 3)), data.draw(few)),
        dims=(data.draw(st.sampled_from([1, 5, 16])), data.draw(st.sampled_from([1, 4, 17]))),
        batch=data.draw(st.integers(1, 2)),
        tokens=tokens,
        slots=data.draw(st.none() | st.integers(1, tokens)),
        dim_form=data.draw(st.integers(2, 4)),
        head_form=data.draw(st.integers(2, 3)),
        sparse=data.draw(st.sampled_from(["dense", "pairs", "layers"])),
        masked=data.draw(st.sampled_from([0.0, 0.4])),
        layout=data.draw(st.sampled_from(["contiguous", "captured", "inside"])),
        seed=data.draw(st.integers(0, 99)),
    )
    p |= {name: None for name in ("bias", "scale") if data.draw(st.booleans())}
    sides = data.draw(st.sampled_from([("source",), ("target",), ("source", "target"), ()]))
    moves = (*sides, *(MAPS if data.draw(st.booleans()) else ()))
    loss = data.draw(st.sampled_from(["mse", "l1", "smooth_l1"]))
    compare(p, torch.float64, loss, data.draw(st.sampled_from([1.0, -2.5])), moves)


@pytest.mark.parametrize(
    ("form", "loss"),
    [
        ({"dim_form": 2, "dims": (16, 33), "head_form": 3, "layers": (3, 2)}, "smooth_l1"),
        ({"dim_form": 3}, "mse"),
        ({"dim_form": 4, "head_form": 3, "layers": (3, 1)}, "smooth_l1"),
        ({"dim_form": 4, "sparse": "layers", "head_form": 3, "layers": (1, 1)}, "mse"),
    ],
)
def test_fp32_over_several_chunks(form: dict, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_plan, "WORKSPACE_BYTES", 1)  # chunks of 64 tokens: one, and a remainder
    p = make(**({"layers": (2, 1), "heads": (2, 1), "dims": (33, 16), "layout": "captured"} | form), tokens=35)
    compare(p, torch.float32, loss)


@pytest.mark.parametrize(
    "form",
    [
        {"dim_form": 2, "slots": 5},  # one token a tile would need 33 rows: here many, of both samples
        {"dim_form": 2, "layers": (3, 20), "heads": (2, 2), "tokens": 9},  # one token a tile
        {"dim_form": 2, "sparse": "pairs", "head_form": 3, "layout": "inside"},
        {"dim_form": 2, "tokens": 1, "batch": 1, "masked": 0.0},
    ],
    ids=str,
)
def test_gradients_beside_the_next_tiles_residual(form: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    # What 16-bit states with a wide target get on a GPU, in the precision of the oracle.
    def delayed(stage: triton_plan.Stage, dims: tuple[int, int], itemsize: int, **where: bool) -> triton_plan.Tile:
        tile = triton_plan.choose_tile(stage, dims, itemsize, **where)
        return dataclasses.replace(tile, delayed=stage.projects and not stage.dims_first)

    from kvds.ops import triton_launch

    monkeypatch.setattr(triton_launch, "choose_tile", delayed)
    monkeypatch.setattr(triton_launch, "_form", triton_launch._form.__wrapped__)  # no form from before
    compare(make(dims=(4, 5), **form))


def test_stages_that_mix_heads_and_layers_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    # More rows than one tile holds: layers are mixed per head, then heads per layer, then projected per row.
    from kvds.ops import triton_compute

    monkeypatch.setattr(triton_plan, "MAX_ROWS", 3)
    monkeypatch.setattr(triton_plan, "MAX_FUSED_ROWS", 1)
    monkeypatch.setattr(triton_compute, "plan_stages", triton_plan.plan_stages.__wrapped__)  # no plan from before
    for form in ({"dim_form": 2}, {"dim_form": 3, "head_form": 3}, {"dim_form": 4, "slots": 3}):
        p = make(**(SMALL | {"layers": (3, 1), "heads": (2, 2)}), **form)
        stages = triton_compute.plan_stages((3, 1), (2, 2), (5, 4), sparse=False, proj_dim=4)
        assert [stage.kind for stage in stages] == ["heads", "layers", "rows"]
        compare(p)


@pytest.mark.parametrize("moves", [*((name,) for name in LEAVES), ("head_mix", "source"), MAPS, ()], ids=str)
@pytest.mark.parametrize("dim_form", [2, 4])
def test_only_what_requires_a_gradient_gets_one(dim_form: int, moves: tuple[str, ...]) -> None:
    compare(make(layers=(2, 1), heads=(2, 1), tokens=3, dim_form=dim_form, masked=0.0), moves=moves)


def test_evaluation_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvds.ops import triton_compute

    p = make(**SMALL)
    expected = map_projection_loss(**p, impl="triton")[0]
    leaves = {name: leaf(p[name], torch.float64) for name in MAPS}
    source = [leaf(t, torch.float64) for t in p["source"]]
    monkeypatch.setattr(triton_compute, "_gradient_place", None)  # calling it is an error
    with torch.no_grad():
        total, _ = map_projection_loss(**(p | leaves | {"source": source}), impl="triton")
    assert not total.requires_grad
    assert torch.equal(total, expected)


@pytest.mark.parametrize("form", [{"dim_form": 2, "heads": (2, 1)}, {"slots": 2}], ids=str)
def test_gradcheck(form: dict) -> None:
    p = make(**({"layers": (2, 1), "heads": (1, 1), "dims": (3, 2), "tokens": 3, "batch": 1} | form))
    n_x, n_y = len(p["source"]), len(p["target"])

    def loss(*t: torch.Tensor) -> torch.Tensor:
        rest = dict(zip(MAPS, t[n_x + n_y :], strict=True))
        return map_projection_loss(**(p | {"source": t[:n_x], "target": t[n_x : n_x + n_y]} | rest), impl="triton")[0]

    leaves = [*p["source"], *p["target"], *(p[name] for name in MAPS)]
    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in leaves], fast_mode=True)


@pytest.mark.parametrize("dim_form", [2, 4])
@pytest.mark.parametrize("slots", [None, 4])
def test_what_is_hidden_or_not_selected_is_never_used(slots: int | None, dim_form: int) -> None:
    p = make(**(SMALL | {"tokens": 9}), slots=slots, dim_form=dim_form, masked=0.4)
    clean = run(p, "triton", torch.float64)
    for side in ("source", "target"):
        used = p["mask"]
        if slots is not None:
            used = torch.zeros(2, 9, dtype=torch.bool).scatter(1, p[f"{side}_index"], p["mask"])
        assert used.any() and not used.all()
        for layer in p[side]:
            layer.masked_fill_(~used[:, None, :, None], float("nan"))
    got = run(p, "triton", torch.float64)
    assert all(torch.equal(got[name], clean[name]) for name in clean)


def test_a_mask_that_hides_one_sample_or_all() -> None:
    p = make(**SMALL, masked=0.0)
    one = torch.ones(2, 5, dtype=torch.bool)
    one[0] = False
    compare(p | {"mask": one})
    for dim_form, shape in ((2, {}), (4, {}), (2, {"slots": 0}), (4, {"slots": 0})):
        nothing = make(**SMALL, **shape, dim_form=dim_form, masked=0.0 if shape else 1.1)
        out = run(nothing, "triton", torch.float64)  # checks that the loss has a graph
        assert all((value == 0).all() for value in out.values())


def test_padding_of_an_index_may_repeat_a_position() -> None:
    p = make(**SMALL, slots=3, masked=0.0)
    for name in ("source_index", "target_index"):
        p[name][:, 2] = p[name][:, 0]
    p["mask"] = torch.tensor([[True, True, False]] * 2)
    compare(p)


def test_two_runs_agree_to_the_bit() -> None:
    p = make((3, 2), (2, 1), (16, 17), tokens=60, dim_form=2)
    first, second = (run(p, "triton", torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_kept_graph_answers_twice() -> None:
    p = make(**SMALL)
    leaves = [p["source"][0].requires_grad_(), p["target"][1].requires_grad_(), p["dim_proj"].requires_grad_()]
    total, _ = map_projection_loss(**p, impl="triton")
    first = torch.autograd.grad(total * 3, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(total, leaves, retain_graph=True)
    third = torch.autograd.grad(total * 3, leaves)
    for a, b, c, d in zip(first, kept, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, 3 * c, rtol=1e-12)
        assert torch.equal(a, d)


def test_layers_mixed_before_heads_lose_nothing_of_their_weights() -> None:
    """Weights that cancel: 1/3 and 1e-4 less. Rounded to fp16 they would leave an error as large as the difference."""
    mix = torch.tensor([[1 / 3, 1e-4 - 1 / 3], [1e-4 - 1 / 3, 1 / 3]])
    source = [torch.ones(2, 2, 3, 16, dtype=torch.float16, requires_grad=True) for _ in range(2)]
    eye = torch.eye(16).expand(2, 16, 16).contiguous()
    heads = torch.eye(2).expand(2, 2, 2).contiguous()
    assert len(triton_plan.plan_stages((2, 2), (2, 2), (16, 16), sparse=False, proj_dim=3)) == 2
    out = map_projection(source, mix, heads, eye, impl="triton")
    gradients = torch.autograd.grad(out, source, torch.ones_like(out))
    for value in (out, *gradients):
        torch.testing.assert_close(value.float(), torch.full_like(value.float(), 1e-4), rtol=1e-2, atol=0)


def test_fp16_gradients_survive_under_a_loss_scale() -> None:
    p = make((2, 1), (1, 1), (16, 16), tokens=40, dim_form=4)
    p["scale"] *= 100
    rounded = {k: [t.half().double() for t in v] if isinstance(v, list) else v for k, v in p.items()}
    rounded |= {name: p[name].half().double() for name in MAPS}
    scale = 2.0**20  # gradients of this mean are below what fp16 keeps; times this they are near 1
    got, want = (
        run(rounded, i, d, upstream=scale) for i, d in (("triton", torch.float16), ("reference", torch.float64))
    )
    assert_same(got, want, 3e-3)


@pytest.mark.parametrize(
    "shape",
    [
        {"layers": (80, 1), "heads": (1, 1), "dims": (16, 16)},
        {"layers": (1, 80), "heads": (1, 1), "dims": (16, 16), "moves": ("target",)},
        {"layers": (1, 2), "heads": (64, 2), "dims": (16, 16), "dim_form": 4},
        {"layers": (2, 1), "heads": (2, 64), "dims": (16, 16), "dim_form": 3},
        {"layers": (1, 1), "heads": (1, 66), "dims": (16, 16), "dim_form": 3, "moves": ("dim_proj",)},
        {"layers": (1, 1), "heads": (1, 1), "dims": (80, 96)},
        {"layers": (2, 1), "heads": (1, 1), "dims": (96, 80)},
        {"layers": (1, 1), "heads": (1, 1), "dims": (128, 128), "dim_form": 4, "batch": 1},
        {"layers": (1, 1), "heads": (1, 1), "dims": (1, 1), "batch": 1, "tokens": 1},
    ],
    ids=lambda shape: "-".join("x".join(map(str, shape[name])) for name in ("layers", "heads", "dims")),
)
def test_extreme_shapes(shape: dict) -> None:
    shape = {"batch": 2, "tokens": 1, "masked": 0.0, "dim_form": 2, "moves": LEAVES} | shape
    moves = shape.pop("moves")
    compare(make(**shape), moves=moves)


@pytest.mark.parametrize("stride", ["batch", "token"])
def test_offsets_beyond_two_to_the_31(stride: str) -> None:
    # Pages of zeros that nobody touches exist only as addresses: the buffers are 8.6 GB wide, and small.
    p = make((1, 1), (1, 1), (3, 2), batch=2, tokens=3, dim_form=2, masked=0.0)
    for side, at in (("source", 3), ("target", 2)):
        gap = (2**31 + 5, at) if stride == "batch" else (at, 2**30 + 7)
        [layer] = p[side]
        try:
            memory = torch.from_numpy(np.zeros(gap[0] + 2 * gap[1] + 64, np.float32))
        except MemoryError:
            pytest.skip("no address space for 2^31 elements")
        apart = memory.as_strided(layer.shape, (gap[0], 1, gap[1], 1) if stride == "batch" else (at, 1, gap[1], 1))
        p[side] = [apart.copy_(layer)]
        assert sum((n - 1) * s for n, s in zip(layer.shape, apart.stride(), strict=True)) >= 2**31
    want = run(p | {side: [p[side][0].contiguous()] for side in ("source", "target")}, "reference", torch.float64)
    maps = {name: leaf(p[name], torch.float32) for name in MAPS}
    leaves = {side: [leaf(p[side][0], torch.float32)] for side in ("source", "target")}
    total, _ = map_projection_loss(**(p | leaves | maps), impl="triton")
    total.backward()
    assert total.item() == pytest.approx(want["loss"].item(), rel=1e-5)
    for side in ("source", "target"):
        assert torch.allclose(leaves[side][0].grad.double(), want[f"{side}.0"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "form",
    [
        {"dim_form": 2},
        {"dim_form": 3, "sparse": "layers"},
        {"dim_form": 4, "head_form": 3, "slots": 4, "layout": "captured"},
        {"dim_form": 4, "sparse": "pairs", "slots": 4},
    ],
    ids=str,
)
def test_projection_alone(form: dict) -> None:
    p = make(**(SMALL | {"heads": (2, 2), "tokens": 6}), **form)
    outputs = []
    for impl in ("reference", "triton"):
        source = [leaf(t, torch.float64) for t in p["source"]]
        maps = {name: leaf(p[name], torch.float64) for name in MAPS}
        out = map_projection(source, **maps, source_index=p.get("source_index"), impl=impl)
        upstream = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape[::-1]).permute(4, 3, 2, 1, 0)
        out.backward(upstream)
        found = {f"source.{i}": t for i, t in enumerate(source)} | {k: t for k, t in maps.items() if t.requires_grad}
        outputs.append(
            {"out": out.detach()} | {k: torch.zeros_like(t) if t.grad is None else t.grad for k, t in found.items()}
        )
    assert_same(outputs[1], outputs[0], 1e-9)


def test_groups_are_slices_of_lists_and_views_of_heads() -> None:
    p = make((4, 2), (2, 2), (5, 4), tokens=5, dim_form=4, head_form=3, layout="captured")
    results = []
    for impl in ("reference", "triton"):
        leaves = {side: [leaf(t, torch.float64) for t in p[side]] for side in ("source", "target")}
        maps = {name: leaf(p[name], torch.float64) for name in MAPS}
        total = torch.zeros((), dtype=torch.float64)
        for g in range(2):
            x, y, h, j = slice(2 * g, 2 * g + 2), slice(g, g + 1), slice(g, g + 1), slice(g, g + 1)
            total = total + map_projection_loss(
                [t[:, h] for t in leaves["source"][x]], [t[:, j] for t in leaves["target"][y]],
                maps["layer_mix"][y, x], maps["head_mix"][y, j, h], maps["dim_proj"][y, j], bias=maps["bias"][y, j],
                mask=p["mask"], scale=p["scale"][y], impl=impl,
            )[0]  # fmt: skip
        total.backward()
        everything = [*leaves["source"], *leaves["target"], *maps.values()]
        results.append({"total": total.detach()} | {str(i): t.grad for i, t in enumerate(everything)})
    assert_same(results[1], results[0], 1e-9)


def test_head_dim_256_is_refused_by_the_kernel_and_left_to_another_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make((1, 1), (1, 1), (256, 16), dim_form=2)
    with pytest.raises(InputError, match="impl=triton: head_dim 256: expected at most 128"):
        map_projection_loss(**p, impl="triton")
    assert map_projection_loss(**p, impl="auto")[0] == map_projection_loss(**p, impl="lean")[0]

    # What auto does on a GPU, told by a stand-in for a CUDA tensor.
    monkeypatch.setattr(triton_plan, "interpreting", lambda: False)
    monkeypatch.setattr(triton_plan, "_missing", lambda device, interpreted: None)
    for dim, dtype, chosen in (
        (128, torch.bfloat16, "triton"),
        (256, torch.bfloat16, "lean"),
        (16, torch.float64, "lean"),
    ):
        like = torch.zeros(1, 1, 1, dim)
        layer = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=dtype, shape=like.shape, stride=like.stride)
        assert _choose("auto", (layer,), (layer,), (dim, dim), (1, 1), 1) == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source": [torch.zeros(2, 5, 2, 5).transpose(1, 2), torch.zeros(2, 2, 5, 5)]}, "different strides"),
        ({"source": [torch.zeros(2, 2, 5, 10)[..., ::2]] * 2}, "not contiguous along head_dim"),
        ({"source": [torch.zeros(2, 2, 5, 5)] * 129, "layer_mix": torch.zeros(2, 129)}, "129 layers, 2 heads"),
    ],
)
def test_what_the_kernel_cannot_take_is_said(change: dict, says: str) -> None:
    p = make(**SMALL, masked=0.0)
    p["target"] = [t.float() for t in p["target"]]
    with pytest.raises(InputError, match=says):
        map_projection_loss(**(p | change), impl="triton")


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_plan, "interpreting", lambda: False)
    with pytest.raises(InputError, match="impl=triton: the states are on cpu: expected a CUDA device"):
        map_projection_loss(**make(**SMALL), impl="triton")
