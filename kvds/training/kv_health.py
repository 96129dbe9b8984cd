"""Health of the student's keys and values during training: what fell too far against its start is told.

Plain numbers, read at logging steps after they were reduced over all ranks: every rank comes to the same conclusions.
"""

from __future__ import annotations

import math
from typing import Any

FALL = 0.5
"""A norm or an effective rank below this part of its start is told."""
VANISHED = 0.01
"""As ``FALL``, for the gradient of the KV loss against what else arrives at keys and values."""

_NORMS = ("kv/norm_keys", "kv/norm_values", "kv/norm_hidden_states")
_RANKS = ("kv/effective_rank_keys", "kv/effective_rank_values", "kv/effective_rank_hidden_states")
_GRADIENTS = ("kv/gradient_squares_kv", "kv/gradient_squares_rest")
_COLLAPSE = "(a smaller --kv_weight, --aligner_update frozen, or --direction student_to_teacher)"
_REMEDIES = {
    "kv_norm": _COLLAPSE,
    "kv_effective_rank": _COLLAPSE,
    "kv_gradient": "(a larger --kv_weight, or --kv_weight hold:SHARE)",
}


class KVHealth:
    """Compares norms, effective ranks and gradients of the student's keys and values with their start.

    Args:
        state: From :attr:`state` of an earlier attempt; None for a new run.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {"start": {}, "told": []}
        self._start: dict[str, float] = dict(state["start"])
        self._told: list[str] = list(state["told"])

    @property
    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"start": dict(self._start), "told": list(self._told)}

    def update(self, metrics: dict[str, float], *, schedule: float = 1.0) -> dict[str, str]:
        """Add ``kv/norm_ratio``, ``kv/effective_rank_ratio`` and ``kv/gradient_ratio`` to a logging step's metrics.

        The first two are geometric means over keys and values of what was measured against the first measurement; the
        third is ``‖KV gradient‖ / ‖all else‖`` at keys and values, from sums of squares, which are taken out.

        Args:
            metrics: Means over ranks, as logged; changed in place.
            schedule: What part of the KV loss's weight the schedule leaves now; a gradient that falls with it is fine.

        Returns:
            Short name → one line, for what fell too far; each name once in a run.
        """
        found = {}
        for name, what, keys in (("norm", "norm", _NORMS), ("effective_rank", "effective rank", _RANKS)):
            ratios = self._against_start({key: metrics[key] for key in keys if key in metrics})
            if not ratios:
                continue
            metrics[f"kv/{name}_ratio"] = math.prod(ratios.values()) ** (1 / len(ratios))
            for key, ratio in ratios.items():
                if not ratio >= FALL:
                    side = key.removeprefix(f"kv/{name}_").replace("_", " ")
                    found[f"kv_{name}"] = f"the {what} of the student's {side} fell to {ratio:.3g} times its start"
        kv, rest = (metrics.pop(key, math.nan) for key in _GRADIENTS)
        if not math.isnan(rest):
            ratio = metrics["kv/gradient_ratio"] = math.sqrt(kv / max(rest, 1e-38))
            if schedule > 0:
                fallen = self._against_start({"gradient": ratio / schedule}).get("gradient", 0.0)
                if not fallen >= VANISHED:
                    found["kv_gradient"] = (
                        f"the KV loss's gradient vanishes: {ratio:.3g} times what else arrives at keys and values"
                    )
        fresh = {name: f"{text} {_REMEDIES[name]}" for name, text in found.items() if name not in self._told}
        self._told += fresh
        return fresh

    def _against_start(self, values: dict[str, float]) -> dict[str, float]:
        """Value over its first one above 0, for those that had one; NaN where a value is not finite."""
        for key, value in values.items():
            if value > 0 and math.isfinite(value):
                self._start.setdefault(key, value)
        return {key: value / self._start[key] for key, value in values.items() if key in self._start}
