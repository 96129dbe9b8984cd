"""Steps whose numbers are not finite: counted, told, and the end of the run when they do not stop.

DeepSpeed reads the global norm of the gradient on the host before each optimizer step and leaves the step out on all
ranks where it is not finite (ZeRO stages 1 to 3, and bf16); in fp32 at stage 0 it steps with a plain optimizer, which
:func:`leave_out_bad_steps` makes do the same. A loss that is not finite is made to spoil the gradient on the device
(:func:`kvds.losses.spoil_gradient`), so that the same one number tells of both, and nothing more is waited for.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch import distributed as dist

from kvds.data.batches import TokenBatch
from kvds.durable_files import write_durably
from kvds.errors import RunError

log = logging.getLogger("kvds")


def leave_out_bad_steps(optimizer: torch.optim.Optimizer) -> None:
    """Make a plain optimizer take no step on a gradient that is not finite.

    ``optimizer.overflow`` says so, where the engine looks for it: it then keeps the schedule and counts a skipped step.
    The gradients are those that all ranks have averaged, so that all of them leave out the same steps.
    """
    take = optimizer.step

    def step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.overflow = not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)))
        return None if self.overflow else take(*arguments, **keywords)

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]  # schedules wrap methods alone


class BadSteps:
    """Follows one run's steps on one rank.

    Args:
        engine: The engine that steps.
        folder: The run's ``--output_dir``; gets ``bad_steps/`` when the run stops.
        limit: Bad steps in a row at which it stops.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, folder: Path, limit: int) -> None:
        self._engine, self._folder, self._limit = engine, folder, limit
        self._parts: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._in_a_row = 0

    @property
    def count(self) -> int:
        """Bad steps since the run began, attempts before a resume included."""
        return self._engine.skipped_steps

    def note(self, batch: TokenBatch, metrics: Mapping[str, Tensor]) -> None:
        """Keep what one micro-batch of the step in flight was made of; reads nothing from the device."""
        self._parts.append((batch.sample_ids, dict(metrics)))

    def end_step(self, step: int) -> bool:
        """Say whether the optimizer step just taken was left out; the same on all ranks, which all call it.

        Args:
            step: Optimizer steps taken so far, this one included.

        Raises:
            RunError: the limit is reached; ``bad_steps/step-NNNNNN-rankR.json`` says what the steps were made of.
        """
        parts, self._parts = self._parts, []
        bad = not self._engine.was_step_applied()
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if not bad:
            return False
        log.warning("step %d: loss or gradient is not finite; left out on all ranks (%d so far)", step, self.count)
        if self._in_a_row >= self._limit:
            file = self._dump(step, parts)
            raise RunError(
                f"{self._in_a_row} steps in a row had a loss or gradient that is not finite, the last was step {step}; "
                f"batches, losses and norms are in {file} (go on from the last checkpoint with a lower --lr or "
                "--max_grad_norm 1.0, or allow more with --max_bad_steps)"
            )
        return True

    def _dump(self, step: int, parts: list[tuple[Tensor, dict[str, Tensor]]]) -> Path:
        content = {
            "step": step,
            "rank": dist.get_rank(),
            "micro_batches": [
                {"sample_ids": ids.tolist(), "metrics": {name: _number(value) for name, value in metrics.items()}}
                for ids, metrics in parts
            ],
            "weight_norms": layer_norms(self._engine),
        }
        folder = self._folder / "bad_steps"
        folder.mkdir(exist_ok=True)
        write_durably(folder / f"step-{step:06d}-rank{dist.get_rank()}.json", json.dumps(content, indent=1) + "\n")
        return folder


def _number(value: Any) -> float | str:
    number = float(value)
    return number if number - number == 0 else str(number)


@torch.no_grad()
def layer_norms(engine: deepspeed.DeepSpeedEngine) -> dict[str, float | str]:
    """Euclidean norm of the weights of each layer (name up to its number) over all ranks; all ranks call it."""
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=engine.device))
    sharded = False
    for name, parameter in engine.module.named_parameters():
        values = parameter
        if hasattr(parameter, "ds_id"):
            sharded, values = True, parameter.ds_tensor.flatten()
            values = values[: max(0, parameter.ds_numel - dist.get_rank() * parameter.ds_tensor.ds_numel)]
        squares[_layer(name)] += values.double().square().sum().to(engine.device)
    names = sorted(squares)
    total = torch.stack([squares[name] for name in names])
    if sharded:
        dist.all_reduce(total)
    return {name: _number(norm) for name, norm in zip(names, total.sqrt().tolist(), strict=True)}


def _layer(name: str) -> str:
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: number + 1])
