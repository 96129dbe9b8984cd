"""Two ranks with half the rows each have the gradients of one with all: watched inside DDP, and wrapped as a whole.

python -m tests.distiller.test_ranks RANK STORE OUTPUT
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kvds import AlignmentSettings, KVDistiller
from tests.harness.distillation_setup import qwen2

SETTINGS = AlignmentSettings(kv_weight="auto:0.5", kv_parts="kv")
WAYS = ("watched", "whole")


def rows() -> dict[str, Tensor]:
    ids = torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def step(way: str, batch: dict[str, Tensor], *, wrap: bool) -> dict[str, Tensor]:
    """Gradients after two backward passes, as of two micro-batches, and the weight."""
    distiller = KVDistiller(qwen2(1, 2, 16), qwen2(2, 3, 24), SETTINGS)
    distiller.fit([batch])
    distiller.train()
    called: nn.Module = distiller if way == "whole" else distiller.student
    called = DistributedDataParallel(called) if wrap else called
    for _ in range(2):
        if way == "whole":
            loss = called(**batch).loss
        else:
            with distiller.watch(called) as forward:
                task = called(**batch).loss
            loss = task + forward.loss(batch)
        loss.backward()
    found = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    return {**found, "weight": torch.tensor(distiller.kv_weight)}


def main(rank: int, store: str, output: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    half = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in rows().items()}
    torch.save({way: step(way, half, wrap=True) for way in WAYS}, f"{output}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_have_the_gradients_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.distiller.test_ranks"]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(tmp_path)]) for rank in range(2)]
    try:
        assert [rank.wait(300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    for way in WAYS:
        expected = step(way, rows(), wrap=False)
        assert any(name.startswith("aligner") for name in expected) and any("student" in name for name in expected)
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt")[way]
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=2e-5, msg=f"{way} {name}")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
