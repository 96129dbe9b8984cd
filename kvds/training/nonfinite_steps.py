"""Non-finite steps: steps whose numbers are not, counted, told, and the end of the run when they do not stop.

DeepSpeed reads the global norm of the gradient on the host before each optimizer step and leaves the step out on all
ranks where it is not finite (ZeRO stages 1 to 3, and bf16). In fp32 at stage 0 it reads no norm and steps with a plain
optimizer, which :func:`leave_out_nonfinite_steps` makes leave the step out by itself, on the device: there the host is
told later, where it reads numbers anyway, and the learning-rate schedule, which the host moves, counts the steps left
out, too. A loss that is not finite is made to spoil the gradient on the device
(:func:`kvds.distillation.losses.spoil_gradient`), so that one number tells of both.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch import distributed as dist

from kvds.data.batches import TokenBatch
from kvds.durable_files import json_text, write_durably
from kvds.errors import RunError

log = logging.getLogger("kvds")


def leave_out_nonfinite_steps(optimizer: torch.optim.Optimizer) -> None:
    """Make a plain optimizer leave weights, moments and step counters as they are on a gradient that is not finite.

    After each step ``optimizer.left_out``, a scalar on the device of the gradients, is 1.0 where it was left out, else
    0.0. The gradients are those that all ranks have averaged, so that all of them leave out the same steps.

    Args:
        optimizer: A fused one of torch's, whose kernel reads that scalar as ``found_inf``, so that nobody waits for it;
            or another such as DeepSpeed's CPU Adam, whose gradients the host has.
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    take = optimizer.step

    def step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)
        self.left_out = (~torch.isfinite(norm)).float()
        if fused:
            self.found_inf = self.left_out
        elif self.left_out:
            return None
        return take(*arguments, **keywords)

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]  # schedules wrap methods alone
    if fused:
        optimizer.register_load_state_dict_pre_hook(_stay_fused)


def _stay_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Groups take their kernel from the checkpoint, and those of earlier versions were not fused on the CPU."""
    return {**state, "param_groups": [{**group, "fused": True, "foreach": None} for group in state["param_groups"]]}


@dataclass(frozen=True)
class _EndedStep:
    number: int
    parts: list[tuple[Tensor, dict[str, Tensor]]]
    left_out: bool | Tensor  # a tensor where only the device knows


class NonfiniteSteps:
    """Follows one run's steps on one rank.

    Args:
        engine: The engine that steps.
        folder: The run's ``--output_dir``; gets ``bad_steps/`` when the run stops.
        limit: Bad steps in a row at which it stops.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, folder: Path, limit: int) -> None:
        self._engine, self._folder, self._limit = engine, folder, limit
        self._parts: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._ended: list[_EndedStep] = []
        self._in_a_row = 0

    @property
    def count(self) -> int:
        """Bad steps read since the run began, attempts before a resume included."""
        return self._engine.skipped_steps

    def note(self, batch: TokenBatch, metrics: Mapping[str, Tensor]) -> None:
        """Keep what one micro-batch of the step in flight was made of; reads nothing from the device."""
        self._parts.append((batch.sample_ids, dict(metrics)))

    def end_step(self, step: int) -> None:
        """Keep the optimizer step just taken for the next :meth:`read`; reads nothing from the device.

        Args:
            step: Optimizer steps taken so far, this one included.
        """
        parts, self._parts = self._parts, []
        left_out = getattr(self._engine.optimizer, "left_out", None)
        if left_out is None:
            left_out = not self._engine.was_step_applied()
        self._ended.append(_EndedStep(step, parts, left_out))

    def read(self, *, wait: bool = True) -> Iterator[tuple[int, int]]:
        """Tell of the steps left out since the last call; the same on all ranks, which all call it. To be iterated to
        its end.

        Args:
            wait: Read what only the device knows yet; without it, such steps are left to a later call.

        Yields:
            Number of a step that was left out, and how many were so far.

        Raises:
            RunError: the limit is reached; ``bad_steps/step-NNNNNN-rankR.json`` says what the step was made of.
        """
        flags = [step.left_out for step in self._ended if isinstance(step.left_out, Tensor)]
        if flags and not wait:
            return
        told = iter(torch.stack(flags).tolist() if flags else [])
        ended, self._ended = self._ended, []
        for step in ended:
            late = isinstance(step.left_out, Tensor)
            if not (next(told) if late else step.left_out):
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            if late:
                self._engine.skipped_steps += 1  # the engine did not know
            log.warning(
                "step %d: loss or gradient is not finite; left out on all ranks (%d so far)", step.number, self.count
            )
            if self._in_a_row >= self._limit:
                file = self._dump(step, ended[-1].number)
                raise RunError(
                    f"{self._in_a_row} steps in a row had a loss or gradient that is not finite, the last was step "
                    f"{step.number}; batches, losses and norms are in {file} (go on from the last checkpoint with a "
                    "lower --lr or --max_grad_norm 1.0, or allow more with --max_bad_steps)"
                )
            yield step.number, self.count

    def _dump(self, step: _EndedStep, now: int) -> Path:
        content = {
            "step": step.number,
            "rank": dist.get_rank(),
            "micro_batches": [
                {"sample_ids": ids.tolist(), "metrics": {name: _number(value) for name, value in metrics.items()}}
                for ids, metrics in step.parts
            ],
            "weight_norms_after_step": now,
            "weight_norms": layer_norms(self._engine),
        }
        folder = self._folder / "bad_steps"
        folder.mkdir(exist_ok=True)
        write_durably(
            folder / f"step-{step.number:06d}-rank{dist.get_rank()}.json", json_text(content, indent=1) + "\n"
        )
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
