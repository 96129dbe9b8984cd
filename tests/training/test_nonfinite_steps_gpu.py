"""On a GPU no optimizer step in fp32 without ZeRO makes the host wait, bad steps or not.

python -m pytest tests/training/test_nonfinite_steps_gpu.py -m gpu
"""

from pathlib import Path

import pytest
import torch

from tests.harness.plain_steps import check_steps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_no_step_makes_the_host_wait(optimizer: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    check_steps("cuda", optimizer, tmp_path)
