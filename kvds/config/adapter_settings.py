"""Settings of adapters on the student, a section of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from kvds.config.settings import SHARE_BELOW_ONE, setting


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Whether adapters are trained in place of the whole student."""

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
