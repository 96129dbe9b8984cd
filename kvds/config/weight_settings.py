"""Settings of weights: which of the student's train, and in how many bits the teacher's are."""

from __future__ import annotations

from dataclasses import dataclass

from kvds.config.setting_field import SHARE_BELOW_ONE, setting


@dataclass(frozen=True, kw_only=True)
class WeightSettings:
    """Adapters in place of the whole student, and a teacher in few bits."""

    lora_r: int | None = setting(
        "rank of LoRA adapters (peft) on the student, which alone train, beside the map; unset: all of it does", None,
        least=1,
    )  # fmt: skip
    lora_alpha: int | None = setting("adapters are scaled by lora_alpha / lora_r; unset: 2 · lora_r", None, least=1)
    lora_dropout: float = setting("dropout of what adapters read", 0.0, least=0, below=1, expected=SHARE_BELOW_ONE)
    lora_target_modules: tuple[str, ...] = setting(
        "names of the projections that get adapters; all-linear: every one but the head", ("all-linear",)
    )
    lora_config: str | None = setting("adapter_config.json of peft, or its folder, in place of lora_r", None)
    teacher_quantization: str = setting(
        "the teacher's matrices in 8 or 4 bits, through bitsandbytes on a GPU", "none", choices=("none", "8bit", "4bit")
    )
