"""The section of settings on completions that the student writes itself."""

from __future__ import annotations

from dataclasses import dataclass

from kvds.config.setting_field import setting


@dataclass(frozen=True, kw_only=True)
class OnPolicySettings:
    """Samples whose completion the student writes, for the teacher to judge."""

    on_policy_share: float = setting(
        "share of the samples whose completion the student writes anew at each step, for the losses that read the "
        "teacher alone; 0: none", 0.0, least=0, most=1, expected="a share from 0 to 1",
    )  # fmt: skip
    on_policy_max_new_tokens: int = setting("on_policy_share: tokens of a completion, within max_length", 128, least=1)
    on_policy_temperature: float = setting(
        "on_policy_share: temperature that completions are drawn at", 1.0, above=0,
        expected="a number above 0, such as 1.0",
    )  # fmt: skip
    on_policy_top_p: float = setting(
        "on_policy_share: tokens are drawn from the likeliest that have this probability together; 1: from all", 1.0,
        above=0, most=1, expected="a share above 0, at most 1",
    )  # fmt: skip
