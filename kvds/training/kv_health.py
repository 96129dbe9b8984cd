"""Health of the student's keys and values during training: what fell too far against its start is told.

Plain numbers, read at logging steps after they were reduced over all ranks: every rank comes to the same conclusions.
"""

from __future__ import annotations

import math
from typing import Any

from kvds.config import RunConfig
from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.errors import listed

FALL = 0.5
"""A norm or an effective rank below this part of its start is told."""
VANISHED = 0.01
"""As ``FALL``, for the gradient of the KV loss against what else arrives at keys and values."""

_NORMS = ("kv/norm_keys", "kv/norm_values", "kv/norm_hidden_states")
_RANKS = ("kv/effective_rank_keys", "kv/effective_rank_values", "kv/effective_rank_hidden_states")
_GRADIENTS = ("kv/gradient_squares_kv", "kv/gradient_squares_rest")


class KVHealth:
    """Compares norms, effective ranks and gradients of the student's keys and values with their start.

    A student from scratch starts with full rank, which has to fall while it learns: of it no fall of rank is told.

    Args:
        cfg: What is set already is no remedy.
        state: From :attr:`state` of an earlier attempt; None for a new run.
    """

    def __init__(self, cfg: RunConfig, state: dict[str, Any] | None = None) -> None:
        self._cfg = cfg
        state = state or {"start": {}, "told": []}
        self._start: dict[str, float] = dict(state["start"])
        self._told: list[str] = list(state["told"])

    def _remedies(self, name: str) -> str:
        cfg = self._cfg
        mode = ALIGNMENT_MODES[cfg.alignment_mode]
        if name == "kv_gradient":
            held = "" if cfg.kv_weight_held else ", or --kv_weight hold:SHARE"
            return f"(a larger --kv_weight than {cfg.kv_weight}{held})"
        found = [f"a smaller --kv_weight than {cfg.kv_weight}"]
        for setting, value in (("aligner_update", "frozen"), ("direction", "student_to_teacher")):
            possible = setting not in mode.only or value in mode.only[setting].values
            if possible and getattr(cfg, setting) != value:
                found.append(f"--{setting} {value}")
        return f"({listed(found, 'or')})"

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
        from_scratch = self._cfg.student_init == "random"
        for name, what, keys in (("norm", "norm", _NORMS), ("effective_rank", "effective rank", _RANKS)):
            ratios = self._against_start({key: metrics[key] for key in keys if key in metrics})
            if not ratios:
                continue
            metrics[f"kv/{name}_ratio"] = math.prod(ratios.values()) ** (1 / len(ratios))
            for key, ratio in ratios.items():
                full_rank_falls = from_scratch and name == "effective_rank" and math.isfinite(ratio)
                if not ratio >= FALL and not full_rank_falls:
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
        fresh = {name: f"{text} {self._remedies(name)}" for name, text in found.items() if name not in self._told}
        self._told += fresh
        return fresh

    def _against_start(self, values: dict[str, float]) -> dict[str, float]:
        """Value over its first one above 0, for those that had one; NaN where a value is not finite."""
        for key, value in values.items():
            if value > 0 and math.isfinite(value):
                self._start.setdefault(key, value)
        return {key: value / self._start[key] for key, value in values.items() if key in self._start}
