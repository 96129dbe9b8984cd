"""The structured alignment through the Triton implementation (interpreted) is the one through the oracle."""

import pytest
import torch

from kvds.align import build_aligner, structured
from kvds.kv import KVShape
from tests.align.test_loss import SELECTION, random_states, randomised, with_grad
from tests.harness.kv_settings import both_parts

pytest.importorskip("triton")

STUDENT, TEACHER = KVShape(2, 2, 3, 2), KVShape(2, 2, 4, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"map_proj_share_dim": True, "direction": "teacher_to_student"},
        {"layer_groups": 2, "head_groups": 2},
        {"layer_map": "endpoint"},
    ],
    ids=str,
)
def test_triton_equals_reference_with_one_call_per_block(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    original = structured.map_projection_loss

    def counting(*args, **kwargs):
        calls.append(kwargs["impl"])
        return original(*args, **kwargs)

    monkeypatch.setattr(structured, "map_projection_loss", counting)
    results = []
    for impl in ("reference", "triton"):
        aligner = randomised(build_aligner(STUDENT, TEACHER, both_parts(**settings, impl=impl))).float()
        student = with_grad(random_states(STUDENT, 1, dtype=torch.float32))
        loss = aligner(student, random_states(TEACHER, 2, dtype=torch.float32), SELECTION).loss
        loss.backward()
        leaves = [*student.keys, *student.values, *(p for p in aligner.parameters() if p.requires_grad)]
        results.append([loss.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)])
    blocks = settings.get("layer_groups", 1) * settings.get("head_groups", 1)
    assert calls == ["reference"] * (2 * blocks) + ["triton"] * (2 * blocks)  # one for K and one for V
    for got, want in zip(results[1], results[0], strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-7
