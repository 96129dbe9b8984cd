"""The section of settings that says which student a run leaves, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass

from kvds.config.settings import setting


@dataclass(frozen=True, kw_only=True)
class OutcomeSettings:
    """The student that a run leaves."""

    load_best_model_at_end: bool = setting(
        "leave the student of the best evaluation, not the last step's; needs eval_steps", False
    )
    metric_for_best_model: str = setting(
        "what makes an evaluation the best, over all corpora: least cross_entropy or kv_loss, or most exact_match",
        "cross_entropy", choices=("cross_entropy", "exact_match", "kv_loss"),
    )  # fmt: skip
    early_stopping_patience: int = setting(
        "evaluations in a row without a better one after which training ends; 0: never", 0, least=0, may_change=True
    )
    push_to_hub: bool = setting(
        "upload student/ at the end, its model card with it", False, may_change=True, identity=False
    )
    hub_model_id: str | None = setting(
        "push_to_hub: NAME or OWNER/NAME; unset: the output folder's name", None, may_change=True, identity=False
    )
    hub_private_repo: bool = setting("push_to_hub: make the repository private", False, may_change=True, identity=False)
