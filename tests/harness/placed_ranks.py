"""A bf16 model under each placement and engine, its buffers and long rows' keys against a whole model's.

Run on two ranks by ``deepspeed`` with the folder of a model.
"""

import copy
import sys
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from transformers import AutoConfig

from kvds.config.deepspeed_file import load_deepspeed_config
from kvds.config.engine_config import student_engine_config, teacher_engine_config
from kvds.config.recipe import parse_run_config
from kvds.data.batches import TokenBatch, collate
from kvds.data.encoding import EncodedSample
from kvds.distillation.module import DistillationModule
from kvds.distributed.process_group import init_distributed, leave_distributed
from kvds.kv.families import backbone
from kvds.models.loading import load_model
from kvds.teacher.teacher import Teacher
from kvds.training.engine import build_engine

TOKENS = 600
FILE = "ds_configs/zero3_cpu_bf16.json"


def settings(folder: str, placement: str) -> Any:
    flags = {"model_name": folder, "output_dir": folder, "deepspeed_config": FILE, "teacher_placement": placement}
    if placement == "tensor_parallel":
        flags["teacher_tp_size"] = "2"
    return parse_run_config([token for name, value in flags.items() for token in (f"--{name}", value)])


def model_of(folder: str, dtype: torch.dtype, engine_config: dict[str, Any] | None = None) -> nn.Module:
    return load_model(
        folder, AutoConfig.from_pretrained(folder), init="pretrained", dtype=dtype, attn_implementation="sdpa", seed=0,
        flag="teacher", engine_config=engine_config,
    )  # fmt: skip


def rows(rank: int) -> TokenBatch:
    ids = torch.randint(1, 50, (TOKENS,), generator=torch.Generator().manual_seed(rank)).tolist()
    sample = EncodedSample(tuple(ids), (1, 2) + (3,) * (TOKENS - 2), 0)
    return collate([sample], [0], 0, 1.0, 1.0)


def keys_and_values(teacher: Teacher, batch: TokenBatch) -> list[torch.Tensor]:
    """Rotated keys of the first layer, where rounding has not yet spread, and values of the last."""
    states: Any = teacher(batch).states
    return [states.keys[0].float(), states.values[-1].float()]


def main() -> None:
    device = init_distributed()
    folder, rank, raw = sys.argv[-1], dist.get_rank(), load_deepspeed_config(FILE)
    batch = rows(rank)
    exact = keys_and_values(Teacher(model_of(folder, torch.float32), device=device, rope="post"), batch)
    whole = model_of(folder, torch.bfloat16)
    buffers = {name: buffer.clone() for name, buffer in backbone(whole).named_buffers()}
    assert buffers and all(buffer.dtype == torch.float32 for buffer in buffers.values())

    def same_buffers(model: nn.Module, what: str) -> None:
        found = dict(backbone(model).named_buffers())
        assert found.keys() == buffers.keys(), (what, found.keys())
        for name, buffer in buffers.items():
            assert found[name].dtype == buffer.dtype and torch.equal(found[name], buffer), (what, name)

    def errors(teacher: Teacher) -> list[float]:
        pairs = zip(keys_and_values(teacher, batch), exact, strict=True)
        return [float((a - b).norm() / b.norm()) for a, b in pairs]

    replicated = errors(Teacher(copy.deepcopy(whole), device=device, rope="post"))
    assert 1e-4 < replicated[0] < 0.01, replicated
    for placement in ("zero3", "zero3_offload", "tensor_parallel"):
        cfg = settings(folder, placement)
        heads = placement == "tensor_parallel"
        placed = None if heads else teacher_engine_config(raw, cfg, dist.get_world_size())
        model = model_of(folder, torch.bfloat16, placed)
        teacher = Teacher(
            model, device=device, engine_config=placed, rope="post", tensor_parallel=cfg.teacher_tp_size if heads else 1
        )
        found = errors(teacher)
        print(f"{placement}: keys and values {found}, replicated {replicated}", flush=True)
        same_buffers(model, placement)
        assert all(a <= 1.1 * b for a, b in zip(found, replicated, strict=True)), (placement, found, replicated)
    for stage in (1, 2, 3):
        own = {**raw, "zero_optimization": {**raw["zero_optimization"], "stage": stage}}
        if stage < 3:
            own["zero_optimization"] = {"stage": stage}
        cfg = settings(folder, "replicated")
        engine_config = student_engine_config(own, cfg, dist.get_world_size())
        student = model_of(folder, torch.bfloat16, engine_config)
        engine = build_engine(DistillationModule(student), cfg, engine_config, 1)
        same_buffers(engine.module.student, f"student, stage {stage}")
    print(f"rank {rank}: all equal", flush=True)
    leave_distributed()


if __name__ == "__main__":
    main()
