"""Steps of a small student in fp32 without ZeRO, some of them on a gradient that is not finite; the host must not wait.

    python -m tests.harness.plain_steps cpu|cuda adamw|sgd OUTPUT_DIR BAD_STEP...

Writes what it saw to ``OUTPUT_DIR/seen.pt``. Needs torch, deepspeed and transformers, and no tracker.
"""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 6


class NoReads(TorchDispatchMode):
    """Refuses what makes a host wait for a GPU, on any device."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if op.overloadpacket.__name__ in self.READS:
            raise RuntimeError(f"the host reads a tensor: {op}")
        return op(*arguments, **(keywords or {}))


def _refuse(self: Tensor, *arguments: Any) -> None:
    raise RuntimeError("the host reads a tensor: tolist or numpy")  # neither goes through the dispatcher


@contextmanager
def no_host_sync(device: str) -> Iterator[None]:
    """Within it a read of a tensor raises; on a GPU torch's own watch, which knows of copies as well, is on, too."""
    kept = Tensor.tolist, Tensor.numpy
    Tensor.tolist = Tensor.numpy = _refuse  # type: ignore[method-assign, assignment]
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoReads():
            yield
    finally:
        Tensor.tolist, Tensor.numpy = kept  # type: ignore[method-assign]
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def main(device: str, optimizer: str, folder: Path, bad: set[int]) -> None:
    """Take the steps."""
    os.environ["DS_ACCELERATOR"] = device
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from kvds.config.deepspeed_file import load_deepspeed_config
    from kvds.config.engine_config import student_engine_config
    from kvds.config.recipe import parse_run_config
    from kvds.data.batches import TokenBatch
    from kvds.data.labels import LabelledPositions
    from kvds.distillation.module import DistillationModule
    from kvds.distillation.step import LossWeights, StepInput
    from kvds.distributed.process_group import init_distributed, leave_distributed
    from kvds.training.engine import build_engine
    from kvds.training.nonfinite_steps import NonfiniteSteps

    place = init_distributed()
    cfg = parse_run_config([
        "--student_name", "tiny", "--alignment_mode", "none", "--optimizer", optimizer, "--output_dir", str(folder),
        "--batch_size", "2", "--lr", "0.05", "--lr_scheduler_type", "linear", "--weight_decay", "0.1",
        "--deepspeed_config", str(Path(__file__).resolve().parents[2] / "ds_configs/zero0_fp32.json"),
    ])  # fmt: skip
    engine_config = student_engine_config(load_deepspeed_config(cfg.deepspeed_config), cfg, 1)
    torch.manual_seed(0)
    student = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=32, num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )).to(place)  # fmt: skip
    engine = build_engine(DistillationModule(student), cfg, engine_config, STEPS)
    steps = NonfiniteSteps(engine, folder, limit=STEPS)
    parameters = list(engine.module.parameters())
    seen: dict[str, Any] = {"lr": [], "weights": [], "states": []}
    for number in range(1, STEPS + 1):
        ids = torch.randint(0, 32, (2, 8))
        batch = TokenBatch(ids, torch.ones_like(ids), ids, torch.ones_like(ids), torch.arange(2), 14.0, 16.0)
        labelled = LabelledPositions.from_labels(ids).to(place)
        inputs = StepInput(batch.to(place), labelled, None, None, None, LossWeights())
        loss, metrics = engine(step=inputs)
        engine.backward(loss * math.nan if number in bad else loss)
        with no_host_sync(device):
            engine.step()
            steps.note(inputs.batch, metrics)
            steps.end_step(number)
            assert list(steps.read(wait=False)) == []
        seen["lr"].append(engine.get_lr()[0])
        seen["weights"].append([parameter.detach().cpu().clone() for parameter in parameters])
        states = [engine.optimizer.state.get(parameter, {}) for parameter in parameters]
        seen["states"].append([{name: value.cpu().clone() for name, value in state.items()} for state in states])
    seen["before"] = steps.count
    seen["told"] = list(steps.read())
    seen["timer"] = engine.tput_timer.config.enabled
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(seen, folder / "seen.pt")
    leave_distributed()


def check_steps(device: str, optimizer: str, folder: Path) -> None:
    """Run this file with bad steps 1, 3 and 4 of 6 and check what it saw."""
    bad = [1, 3, 4]
    command = [sys.executable, "-m", "tests.harness.plain_steps", device, optimizer, str(folder)]
    done = subprocess.run([*command, *map(str, bad)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = torch.load(folder / "seen.pt")
    assert seen["before"] == 0 and seen["told"] == [(1, 1), (3, 2), (4, 3)]
    assert seen["timer"] is False
    # The host moves the schedule, and does not know of the steps left out.
    assert all(math.isclose(lr, 0.05 * (6 - step) / 6, abs_tol=1e-12) for step, lr in enumerate(seen["lr"], 1))
    for step in range(2, 7):
        same = [torch.equal(*pair) for pair in zip(*seen["weights"][step - 2 : step], strict=True)]
        assert all(same) if step in bad else not any(same)
        before, after = seen["states"][step - 2 : step]
        if optimizer == "adamw":
            taken = step - sum(number <= step for number in bad)
            assert {float(state["step"]) for state in after} == {taken}
            moments = [torch.equal(a[key], b[key]) for a, b in zip(before, after, strict=True) for key in ("exp_avg",)]
            assert all(moments) if step in bad else not any(moments)
    assert all(torch.isfinite(weight).all() for weights in seen["weights"] for weight in weights)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), {int(number) for number in sys.argv[4:]})
