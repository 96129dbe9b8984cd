"""Course of the KV loss through a run: its weight, what it does to keys and values, and its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from kvds.config import RunConfig
from kvds.data.loader import BatchLoader
from kvds.distillation.calibration import nothing_mapped
from kvds.distillation.step_input_builder import StepInputBuilder
from kvds.training.kv_health import KVHealth
from kvds.training.kv_let_go import KVLetGo
from kvds.training.kv_weight import KVWeight, other_losses
from kvds.training.loss_gradients import MakeInput, balanced_kv_weight, calibrate_kv_weight, kv_agreement

_ANYWAY = "(to keep it: --no_kv_let_go, or a number such as --kv_weight 1.0)"


class KVCourse:
    """What becomes of the KV loss, the same on all ranks, which all call each method that measures.

    Args:
        cfg: The run.
        engine: What trains.
        loader: Of the training rows.
        inputs: Makes a step's input; told once keys and values are not matched any more.
        total_steps: Of the run.
    """

    def __init__(
        self, cfg: RunConfig, engine: Any, loader: BatchLoader, inputs: StepInputBuilder, total_steps: int
    ) -> None:
        self._cfg, self._engine, self._loader, self._inputs, self._total = cfg, engine, loader, inputs, total_steps
        self.weight, self._health = KVWeight(cfg), KVHealth(cfg)
        self._let_go = KVLetGo(total_steps, measures=cfg.lets_go)

    @property
    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; waits for the device where the weight is balanced."""
        return {**self.weight.state, "kv_health": self._health.state, "kv_against": self._let_go.state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :attr:`state` of an earlier attempt, among other entries of its checkpoint."""
        self.weight.restore(state)
        self._health = KVHealth(self._cfg, state["kv_health"])
        self._let_go.restore(state.get("kv_against", 0))

    def begin(self, start_r2: Sequence[Mapping[str, Sequence[float]]]) -> None:
        """Take the weight of a new run's first step.

        Args:
            start_r2: As :attr:`kvds.training.build.RunModels.start_r2`.
        """
        empty = self._cfg.lets_go and nothing_mapped(start_r2)
        fitted = any(start_r2)
        self.weight.begin(lambda share: 0.0 if empty else self._calibrated(share, fitted))
        if self._cfg.lets_go and self.weight.value == 0:
            self.weight.let_go(0)

    def _calibrated(self, share: float, fitted: bool) -> float:
        cfg, inputs = self._cfg, self._made(self._loader.step(0), 0)
        if cfg.kv_weight_balanced:
            return balanced_kv_weight(self._engine, inputs, share, partial(other_losses, cfg))
        return calibrate_kv_weight(
            self._engine, inputs, share, cfg.task_weight or 1.0, fitted=fitted, may_be_none=cfg.lets_go
        )

    def _made(self, batches: Sequence[Any], step: int, *, match: bool = True) -> list[MakeInput]:
        return [partial(self._inputs, batch, step=step, match=match) for batch in batches]

    @property
    def ended_at_start(self) -> dict[str, str]:
        """Short name → one line, where the loss is let go of before step 1."""
        if self.weight.ended != 0:
            return {}
        return {"kv_let_go": f"the KV loss is let go of: no map explains held-out states of the teacher {_ANYWAY}"}

    def weight_at(self, step: int) -> float | Tensor:
        """The weight of 0-based optimizer step ``step``, which inputs are made for from now on."""
        # Once more at a weight of 0, see DistillationModule; then neither teacher nor aligner runs for it.
        self._inputs.matching = self._cfg.uses_kv and (step == 0 or self.weight.part(step - 1, self._total) > 0)
        return self.weight.at(step, self._total)

    def look(self, step: int, metrics: dict[str, float], weight: float | Tensor) -> dict[str, str]:
        """See to keys and values at a logging step.

        Args:
            step: Optimizer steps taken.
            metrics: Means over ranks; added to.
            weight: Of the step.

        Returns:
            Short name → one line, for what is to be told.
        """
        if not self._cfg.uses_kv:
            return {}
        metrics["kv/weight"] = float(weight)
        fallen = self._health.update(metrics, schedule=self.weight.part(step - 1, self._total))
        self.weight.hold(metrics)
        return fallen

    def due(self, step: int) -> bool:
        """Whether the task is to be asked after ``step`` optimizer steps."""
        return self._let_go.due(step) and self.weight.part(step, self._total) > 0

    def ask_the_task(self, step: int) -> tuple[float, dict[str, str]]:
        """How the KV loss agrees with the task on rows half an epoch ahead; it is let go of if it does not.

        Args:
            step: Optimizer steps taken.

        Returns:
            As :func:`kvds.training.loss_gradients.kv_agreement`; and short name → one line, for what is to be told.
        """
        ahead = step + self._loader.steps_per_epoch // 2
        task = self._made(self._loader.out_of_turn(ahead), ahead, match=False)
        agreement = kv_agreement(self._engine, task, self._made(self._loader.out_of_turn(step), step))
        if not self._let_go.note(agreement):
            return agreement, {}
        self.weight.let_go(step)
        why = f"the KV loss is let go of: its gradient turned against the task's, cosine {agreement:.3g} {_ANYWAY}"
        return agreement, {"kv_let_go": why}
