"""All settings of a run side by side, and what they say together."""

from __future__ import annotations

from dataclasses import dataclass

from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.on_policy_settings import OnPolicySettings
from kvds.config.outcome_settings import OutcomeSettings
from kvds.config.settings import AlignmentSettings, DataSettings, ModelSettings, OptimizationSettings, RunSettings
from kvds.config.weight_settings import WeightSettings


@dataclass(frozen=True, kw_only=True)
class AllSettings(
    ModelSettings, WeightSettings, DataSettings, AlignmentSettings, OnPolicySettings, OptimizationSettings,
    OutcomeSettings, RunSettings,
):  # fmt: skip
    """The sections as one; nothing is checked here (:class:`kvds.config.RunConfig` does)."""

    @property
    def first_teacher(self) -> str | None:
        """Folder or hub name of the teacher, of several the first."""
        return self.all_teachers[0] if self.all_teachers else None

    @property
    def all_teachers(self) -> tuple[str, ...]:
        """Folders or hub names of all teachers."""
        single = self.teacher_name or self.model_name
        return self.teacher_names or (() if single is None else (single,))

    @property
    def weights_of_teachers(self) -> tuple[float, ...]:
        """Factor of each teacher's KV loss."""
        return self.teacher_weights or (1 / len(self.all_teachers),) * len(self.all_teachers)

    def teacher_seed(self, number: int = 0) -> int:
        """Of the random weights of teacher ``number`` of :attr:`teachers`; ``seed`` itself is the student's."""
        return self.seed + 1 + number

    @property
    def student(self) -> str:
        """Folder or hub name of the student; construction refuses a run without one."""
        return self.student_name or self.model_name or ""

    @property
    def kv_weight_value(self) -> float | None:
        """The weight given as a number, or None where it is calibrated."""
        return None if isinstance(self.kv_weight, str) else float(self.kv_weight)

    @property
    def kv_weight_held(self) -> bool:
        """Whether the weight is moved during training, so that the KV gradient keeps its share."""
        return isinstance(self.kv_weight, str) and self.kv_weight.startswith("hold:")

    @property
    def kv_weight_balanced(self) -> bool:
        """Whether the weight is set anew at each step, so that the KV loss keeps its share of all losses."""
        return isinstance(self.kv_weight, str) and self.kv_weight.startswith("balance:")

    @property
    def lets_go(self) -> bool:
        """Whether the run may give up the KV loss by itself: a number is taken at its word."""
        return self.kv_let_go and self.uses_kv and isinstance(self.kv_weight, str)

    @property
    def kv_weight_share(self) -> float | None:
        """The share of ``auto:SHARE``, ``hold:SHARE`` or ``balance:SHARE``, or None where a number was given."""
        return float(self.kv_weight.split(":")[1]) if isinstance(self.kv_weight, str) else None

    @property
    def chosen_map_start(self) -> str:
        """``map_start``, for ``auto`` what it stands for: a random map would pull pretrained keys and values away."""
        if self.map_start != "auto":
            return self.map_start
        fitted = self.student_init == "pretrained" and ALIGNMENT_MODES[self.alignment_mode].mapped
        return "ridge" if fitted else "random"

    @property
    def uses_adapters(self) -> bool:
        """Whether adapters on the student are trained in place of the whole of it."""
        return self.lora_r is not None or self.lora_config is not None

    @property
    def uses_kv(self) -> bool:
        """Whether keys and values are matched at all."""
        return ALIGNMENT_MODES[self.alignment_mode].aligned and self.kv_weight_value != 0

    @property
    def uses_teacher(self) -> bool:
        """Whether a loss reads the teacher."""
        return self.uses_teacher_kv or self.logit_kd_weight > 0

    def teacher_ahead(self, device: str) -> bool:
        """Whether what the teacher gives the next micro-batch is there beside the present one's: asked for, or copied
        to a GPU from a cache meanwhile.

        Args:
            device: ``"cpu"`` or ``"cuda"``, where the run is.
        """
        copied = self.teacher_cache is not None and device == "cuda"
        return self.uses_teacher and (self.teacher_overlap or copied)

    @property
    def uses_teacher_kv(self) -> bool:
        """Whether the teacher's keys and values, or its hidden states, are read: to match, or to write from."""
        return self.uses_kv or self.handoff_weight > 0
