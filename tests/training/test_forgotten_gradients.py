"""Gradients that were looked at and forgotten are in no later look and in no step, at any stage, offloaded or not."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

SCRIPT = """
import json, os
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
import torch
import deepspeed
import deepspeed.comm.torch
from kvds.distributed.rank_environment import free_port
from kvds.training.engine import discard_gradients, gradient_norm

os.environ["MASTER_PORT"] = str(free_port())
deepspeed.comm.torch.build_shm_op = lambda: None  # one rank talks to nobody
deepspeed.init_distributed("gloo")

def engine_of(stage, offload):
    zero = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "bf16": {"enabled": True},
        "gradient_clipping": 0.0,
        "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
    }
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]

def look(engine, factor):
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(factor * engine(torch.ones(1, 4).bfloat16()).sum())
    norm = gradient_norm(engine, list(engine.module.parameters()))
    discard_gradients(engine)
    engine.set_gradient_accumulation_boundary(None)
    return norm

def step(engine):
    before = float(engine(torch.ones(1, 4).bfloat16()).sum())
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(engine(torch.ones(1, 4).bfloat16()).sum(), scale_wrt_gas=False)
    engine.step()
    return float(engine(torch.ones(1, 4).bfloat16()).sum()) - before

found = {}
for stage, offload in ((0, False), (1, False), (1, True), (2, False), (2, True), (3, False), (3, True)):
    engine = engine_of(stage, offload)
    looks = [look(engine, factor) for factor in (1.0, 3.0, 5.0)]
    found[f"{stage} {offload}"] = looks, step(engine), [look(engine, factor) for factor in (1.0, 3.0)], step(engine)
print("FOUND" + json.dumps(found))
"""


def test_what_was_looked_at_is_forgotten():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    found = json.loads(line.removeprefix("FOUND"))
    assert len(found) == 7
    for name, (looks, first, later, second) in found.items():
        # Of four weights with inputs of 1: the gradient is 1 each, its norm 2, and a step takes 1 from each.
        assert looks == pytest.approx([2, 6, 10], rel=1e-2) and later == pytest.approx([2, 6], rel=1e-2), name
        assert (first, second) == (pytest.approx(-4, rel=2e-2), pytest.approx(-4, rel=2e-2)), name
