"""What a call of the Triton implementation launches, in Triton's interpreter."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch

from kvds.ops import triton_plan
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
