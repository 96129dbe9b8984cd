"""What stands around a student in a loop of one's own, and the ranks that share it."""

from __future__ import annotations

from torch import Tensor, nn
from torch import distributed as dist


def inside(model: nn.Module) -> nn.Module:
    """The student without DDP, FSDP or DeepSpeed's engine around it; PEFT and torch.compile stay."""
    while isinstance(module := getattr(model, "module", None), nn.Module):
        model = module
    return model


def runs_whole(model: nn.Module) -> bool:
    """Whether ``model`` must be called itself: what is around it gathers weights and sends gradients to other ranks."""
    fully_sharded = any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__)
    return fully_sharded or inside(model) is not model


def ranks() -> int:
    """How many there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> None:
    """Sum ``tensor`` over all ranks in place; nothing without a process group."""
    if ranks() > 1:
        dist.all_reduce(tensor)
