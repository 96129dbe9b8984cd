"""The warp-specialised kernels of compute capability 9.0: every form beside the oracle, at every number of tokens.

python -m pytest tests/ops/test_hopper_gpu.py -m gpu
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from kvds.ops import map_projection_loss
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


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each call that the fused kernel of compute capability 9.0 takes."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    from kvds.ops import gluon_launch

    calls: list[str] = []
    original = gluon_launch.prepare_fused
    monkeypatch.setattr(gluon_launch, "prepare_fused", lambda *a: (calls.append("fused"), original(*a))[1])
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
    original = gluon_launch.prepare_project

    def prepare(*given: Any) -> Any:
        launch = original(*given)
        return launch._replace(arguments=lambda *tokens: (calls.append("project"), launch.arguments(*tokens))[1])

    monkeypatch.setattr(gluon_launch, "prepare_project", prepare)
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
