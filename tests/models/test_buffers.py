"""A bf16 model keeps its fp32 buffers wherever it is placed, so that keys far from the start are turned rightly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from kvds.models.buffers import buffers_kept

REPOSITORY = Path(__file__).resolve().parents[2]


def test_what_an_engine_rounds_comes_back() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3).bfloat16())
    module[1].running_mean.fill_(1 / 3)
    held = module[1].running_mean
    with buffers_kept(module):
        module.bfloat16()
        module[2].float()
    assert module[0].weight.dtype == torch.bfloat16
    assert module[1].running_mean.dtype == torch.float32 and torch.equal(module[1].running_mean, held)
    assert float(module[1].running_mean[0]) == pytest.approx(1 / 3, abs=1e-7)
    assert module[2].running_mean.dtype == torch.bfloat16 and module[1].num_batches_tracked.dtype == torch.int64


@pytest.mark.multiprocess
def test_long_rows_under_every_placement_and_engine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    port = str(20000 + (os.getpid() + 11) % 20000)
    script = ["tests/harness/placed_ranks.py", str(tmp_path)]
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", port, *script]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("all equal") == 2
