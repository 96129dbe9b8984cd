"""Rules of adapters on the student."""

from __future__ import annotations

import os
from collections.abc import Iterator

from kvds.config.all_settings import AllSettings
from kvds.config.setting_rules import Rule


def adapter_rules(cfg: AllSettings) -> Iterator[Rule]:
    """Flags or a file, and nothing that asks for the whole student."""
    if cfg.lora_config is not None:
        expected = "an existing adapter_config.json of peft, or its folder"
        yield os.path.exists(cfg.lora_config), "lora_config", cfg.lora_config, expected
        yield cfg.lora_r is None, "lora_r", cfg.lora_r, "none with --lora_config, which says it"
        for name, unset in (("lora_alpha", None), ("lora_dropout", 0.0), ("lora_target_modules", ("all-linear",))):
            value = getattr(cfg, name)
            shown = " ".join(value) if isinstance(value, tuple) else value
            yield value == unset, name, shown, "none beside --lora_config, which says it"
    if cfg.uses_adapters:
        expected = "auto or off with adapters, which compiled layers would pass by"
        yield cfg.compile != "on", "compile", cfg.compile, expected
