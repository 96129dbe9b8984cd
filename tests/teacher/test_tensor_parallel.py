"""Ranks that share the heads of a teacher each get what a whole one gives; test_train_zero3.py trains with one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import GPT2Config, Qwen2Config

from kvds.errors import InputError
from kvds.teacher.tensor_parallel import check_heads
from tests.training.test_zero3 import flags, logged, models

__all__ = ["models"]  # a fixture
REPOSITORY = Path(__file__).resolve().parents[2]
QWEN2 = Qwen2Config(num_hidden_layers=2, hidden_size=96, num_attention_heads=12, num_key_value_heads=4)


@pytest.mark.parametrize(("size", "world_size"), [(2, 2), (2, 6), (4, 8)])
def test_numbers_that_divide_pass(size: int, world_size: int) -> None:
    check_heads(QWEN2, size, world_size)


@pytest.mark.parametrize(
    ("config", "size", "world_size", "message"),
    [
        (QWEN2, 4, 6, "teacher_tp_size=4: 6 ranks are no multiple"),
        (QWEN2, 8, 8, "teacher_tp_size=8: the teacher has 4 key-value heads; expected a divisor"),
        (GPT2Config(n_head=4, n_embd=32), 2, 2, "heads of gpt2 are not known to be found again"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(config: object, size: int, world_size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_heads(config, size, world_size)


@pytest.mark.multiprocess
def test_two_ranks_each_get_the_keys_and_values_of_a_whole_teacher() -> None:
    port = str(20000 + (os.getpid() + 7) % 20000)
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", port, "tests/harness/heads_ranks.py"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("all equal") == 2


@pytest.mark.multiprocess
def test_two_groups_of_two_ranks_train_as_four_whole_teachers_do(models, rank_server, tmp_path) -> None:
    """Groups that are not all ranks; the rows of each rank, a quarter of the batch, come from its own."""
    heads = {"teacher_placement": "tensor_parallel", "teacher_tp_size": 2}
    shared = {"batch_size": 2, "max_steps": 3, "kv_method": "random", "kv_budget": 6, "kv_weight": "auto:1.5"}
    for name, placed in (("whole", {}), ("heads", heads)):
        ranks = rank_server.start(flags(models, tmp_path / name, **shared, **placed), ranks=4, log=tmp_path / "log")
        assert ranks.wait(300) == [0] * 4, (tmp_path / "log").read_text()[-4000:]
    for key in ("loss/task", "loss/kv", "kv/weight", "grad_norm"):
        expected = logged(tmp_path / "whole", key)
        assert len(set(expected)) > 1 or key == "kv/weight"
        assert logged(tmp_path / "heads", key) == pytest.approx(expected, rel=1e-5), key
    whole, dealt = (load_file(tmp_path / name / "student/model.safetensors") for name in ("whole", "heads"))
    assert all((whole[name] - dealt[name]).norm() <= 1e-5 * whole[name].norm() for name in whole)
