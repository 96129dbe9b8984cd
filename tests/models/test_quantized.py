"""Teachers in 8 and 4 bits: refused where nothing runs them, planned by their bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvds.config import RunConfig, extras
from kvds.errors import InputError
from kvds.models.quantized import check_quantizable, quantization_config
from kvds.plan.states import ModelSize, teacher_weights


def run_of(**settings: Any) -> RunConfig:
    return RunConfig(teacher_name="a/b", student_name="c/d", output_dir="out", **settings)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_machine_without_a_gpu_is_told_before_any_weights(bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = run_of(teacher_quantization=bits)
    with pytest.raises(InputError, match=f"teacher_quantization={bits}: the ranks run on cpu; expected none there"):
        check_quantizable(cfg, torch.device("cpu"))
    monkeypatch.setattr(extras, "installed", lambda package: package != "bitsandbytes")
    with pytest.raises(InputError, match=r"bitsandbytes is not installed \(pip install 'kvds\[quantization\]'\)"):
        check_quantizable(cfg, torch.device("cuda"))
    check_quantizable(run_of(), torch.device("cpu"))


def test_what_transformers_is_asked_for() -> None:
    assert quantization_config("none", torch.bfloat16) is None
    assert quantization_config("8bit", torch.bfloat16).load_in_8bit
    four = quantization_config("4bit", torch.bfloat16)
    assert four.load_in_4bit and four.bnb_4bit_compute_dtype == torch.bfloat16


def test_matrices_are_planned_by_their_bits_and_the_rest_as_it_is() -> None:
    size = ModelSize(total=1000, layer=100, backbone=800, head=100, trained=1000)
    assert teacher_weights(run_of(), size, 2) == 2000
    assert teacher_weights(run_of(teacher_quantization="8bit"), size, 2) == 800 + 2 * 200
    assert teacher_weights(run_of(teacher_quantization="4bit"), size, 2) == 400 + 2 * 200
