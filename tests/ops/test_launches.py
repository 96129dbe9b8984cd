"""What a call of the Triton implementation launches, in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections import Counter
from typing import Any

import pytest
import torch

from kvds.ops import map_projection, triton_plan
from kvds.ops.gradients import LossProblem, Wanted
from kvds.ops.kernel_arguments import FoldForm, FusedForm, ProjectForm, Stage, StageForm, Sum
from tests.harness.ops_problems import make, run

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are not interpreted in this session"
)


class _Counted:
    """A kernel of which launches are noted."""

    def __init__(self, kernel: Any, name: str, launches: list[str]) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid: tuple) -> Any:
        self.launches.append(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize(
    ("form", "stages"), [({"dim_form": 2, "head_form": 3}, 1), ({"dim_form": 4, "dims": (16, 17)}, 3)], ids=str
)
def test_launches_of_a_call(form: dict, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvds.ops import triton_launch, triton_sums

    monkeypatch.setattr(triton_plan, "WORKSPACE_BYTES", 1)  # chunks of 64 tokens
    launches: list[str] = []
    for module, names in (
        (triton_launch, ("count", "weights", "map_projection", "mix", "unmix", "scale")),
        (triton_sums, ("sum", "fold")),
    ):
        for name in (f"{name}_kernel" for name in names):
            monkeypatch.setattr(module, name, _Counted(getattr(module, name), name, launches))
    p = make((2, 1), (2, 1), **({"dims": (5, 4)} | form), tokens=35, batch=2, layout="captured")
    run(p, "triton", torch.float64)
    expected = {"count_kernel": 1, "sum_kernel": 1, "fold_kernel": 1, "scale_kernel": 1, "weights_kernel": 1}
    expected |= {"map_projection_kernel": 1} if stages == 1 else {}
    expected |= {"mix_kernel": 2, "map_projection_kernel": 2, "unmix_kernel": 2} if stages == 3 else {}
    assert Counter(launches) == expected


@pytest.mark.parametrize("form", [StageForm, FusedForm, ProjectForm, FoldForm, Sum])
def test_forms_that_differ_are_two_to_a_cache(form: type) -> None:
    """In anything: the JIT looks compiled kernels up by them."""
    names = [field.name for field in dataclasses.fields(form)]
    first = form(**dict.fromkeys(names, 0))
    for other in (dataclasses.replace(first, **{name: 1}) for name in names):
        assert first != other and len({("constexpr", first): 0, ("constexpr", other): 1}) == 2


def test_every_launch_of_a_process_has_the_kernel_of_its_own_form() -> None:
    """Loss, gradients of either side and projections of one stage, as a process may ask for them in turn."""
    from kvds.ops import triton_launch

    stage = Stage("layers", 3, 1, 1, 2, 1, 2, projects=True)
    flags = ("any_gradient", "source_grad", "target_grad", "mix_grad", "proj_grad", "bias_grad", "aligned")
    forms = [
        triton_launch._form(
            stage, (128, 64), dtype, True, mode=mode, loss="mse", normalize=True, source_flat=False, target_flat=False,
            **dict(zip(flags, on, strict=True)),
        )
        for dtype in (torch.bfloat16, torch.float32)
        for mode in ("loss", "store", "given")
        for on in itertools.product((False, True), repeat=len(flags))
    ]  # fmt: skip
    kernels: dict[StageForm, str] = {}
    for form in forms:
        assert kernels.setdefault(form, repr(form)) == repr(form)


def test_a_projection_without_gradient_has_no_node_and_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvds.ops import triton_compute, triton_launch

    p = make((3, 2), (2, 1), (16, 17), dim_form=4, slots=5, masked=0.0)
    arguments = {name: p[name] for name in ("source", "layer_mix", "head_mix", "dim_proj", "bias", "source_index")}
    want = map_projection(**arguments, impl="reference")
    launches: list[str] = []
    for name in ("weights_kernel", "map_projection_kernel", "mix_kernel"):
        monkeypatch.setattr(triton_launch, name, _Counted(getattr(triton_launch, name), name, launches))
    monkeypatch.setattr(triton_compute, "_Projection", None)  # using it is an error
    got = map_projection(**arguments, impl="triton")
    assert torch.allclose(got, want, rtol=1e-12)
    with torch.no_grad():
        arguments["dim_proj"].requires_grad_()
        assert torch.equal(map_projection(**arguments, impl="triton"), got)
    assert Counter(launches) == {"weights_kernel": 2, "map_projection_kernel": 2, "mix_kernel": 2}


def test_why_the_plain_kernels_take_a_call(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow, layer = Wanted(source=True, dim_proj=True), Wanted(target=True, dim_proj=True), 24
    monkeypatch.setattr(triton_plan, "interpreting", lambda: False)
    for change, wanted, says in (
        ({}, wide, None),
        ({}, Wanted(), "nothing gets a gradient"),
        ({"dtype": torch.float32}, wide, "states in torch.float32: expected bfloat16 or float16"),
        ({"dims": (96, 128)}, wide, "head_dim 96 to 128: expected 64 or 128, not both 128"),
        ({"capability": (8, 9)}, wide, "compute capability 8.9: expected 9.0"),
        ({"dims": (128, 64)}, narrow, None),
        ({"dims": (128, 64)}, wide, "the source, which is wider than its target, gets a gradient"),
        ({"layers": 33}, wide, "more than 64 rows (layers times heads) of one projection, or a sparse layer map"),
        ({"aligned": False}, wide, "rows of states start off multiples of 16 bytes"),
        ({"aligned": False, "proj": 4}, wide, "rows of states start off multiples of 16 bytes"),
        ({"layers": 33, "proj": 4}, wide, None),
    ):
        (dx, dy), layers = change.get("dims", (64, 128)), change.get("layers", layer)
        monkeypatch.setattr(triton_plan, "capability", lambda _, change=change: change.get("capability", (9, 0)))
        states = (torch.zeros(1, 2, 1, dx, dtype=change.get("dtype", torch.bfloat16)),) * layers
        proj = torch.zeros(*(layers, 2)[: change.get("proj", 2) - 2], dx, dy)
        nothing = (None,) * 5
        problem = LossProblem(states, states, torch.zeros(layers, layers), torch.zeros(2, 2), proj, *nothing, "mse")
        stages = triton_plan.plan_stages((layers,) * 2, (2, 2), (dx, dy), sparse=False, proj_dim=proj.dim())
        assert triton_plan.why_plain(problem, wanted, stages, change.get("aligned", True)) == says
    triton_plan.tell_plain.cache_clear()
    with caplog.at_level(logging.INFO, logger="kvds"):
        for _ in range(2):
            triton_plan.tell_plain("kernels are interpreted")
    assert [record.getMessage() for record in caplog.records] == [
        "kvds.ops: the plain Triton kernels take a call: kernels are interpreted"
    ]
