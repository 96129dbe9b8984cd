"""End of a KV loss that does not help: when a run gives it up by itself, from numbers that all ranks have alike."""

from __future__ import annotations


class KVLetGo:
    """When a run gives up its KV loss: its gradient on the student has turned against that of the task.

    It is measured (:func:`kvds.training.loss_gradients.kv_agreement`) at most eight times a run, and no closer than 40
    steps, so that it takes a tenth of the time at most. Once may be chance; twice in a row below 0 is the end.

    Args:
        total_steps: Of the run.
        measures: Whether the run may give it up at all.
    """

    CHECKS, LEAST_STEPS, IN_A_ROW = 8, 40, 2

    def __init__(self, total_steps: int, *, measures: bool) -> None:
        self._every = max(total_steps // (self.CHECKS + 1), self.LEAST_STEPS)
        self._total, self._measures = total_steps, measures
        self._against = 0

    def due(self, step: int) -> bool:
        """Whether to measure after ``step`` optimizer steps."""
        return self._measures and step % self._every == 0 and 0 < step < self._total

    def note(self, agreement: float) -> bool:
        """Take what was measured; whether that is the end. What is not a number says nothing."""
        if agreement == agreement:
            self._against = self._against + 1 if agreement < 0 else 0
        return self._against >= self.IN_A_ROW

    @property
    def state(self) -> int:
        """A plain value for a checkpoint."""
        return self._against

    def restore(self, state: int) -> None:
        """Go on from :attr:`state`."""
        self._against = state
