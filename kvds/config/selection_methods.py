"""Selection methods: what is true of each way to choose the positions that count, read by flags, rules and plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SelectionMethod:
    """Facts of one selection method.

    Attributes:
        doc: Which positions it chooses, for ``--help``.
        budget: Whether ``kv_budget`` says how many; without one every position counts.
        draws: Whether it draws anew in each step.
        reads_keys: Whether it scores positions by the teacher's keys (:data:`kvds.kv.scores.SCORES`), so that the
            teacher runs first; all others (:data:`kvds.kv.select.CHOICES`) know where without it.
        observing_tokens: Tokens per row whose queries it reads beside the keys, where ``observing_tokens`` is unset; 0:
            none, whatever is set.
        observers: The text whose last tokens those are: ``"row"`` or ``"answer"``.
        keeps_window: Whether those are all kept, ahead of any score.
        weighs_redundancy: Whether ``rkv_lambda`` weighs importance against redundancy.
    """

    doc: str
    budget: bool = True
    draws: bool = False
    reads_keys: bool = False
    observing_tokens: int = 0
    observers: str = "row"
    keeps_window: bool = False
    weighs_redundancy: bool = False


SELECTION_METHODS: dict[str, SelectionMethod] = {
    "full": SelectionMethod(doc="every one", budget=False),
    "right_crop": SelectionMethod(doc="the last"),
    "uniform": SelectionMethod(doc="evenly spaced"),
    "random": SelectionMethod(doc="drawn anew in each step", draws=True),
    "snapkv": SelectionMethod(
        doc="most attended to by the last tokens", reads_keys=True, observing_tokens=8, keeps_window=True
    ),
    "keydiff": SelectionMethod(doc="keys least like the mean key", reads_keys=True),
    "rkv": SelectionMethod(
        doc="most attended to by the answer, least redundant",
        reads_keys=True,
        observing_tokens=32,
        observers="answer",
        weighs_redundancy=True,
    ),
    "rkv_window": SelectionMethod(
        doc="the same by the last tokens",
        reads_keys=True,
        observing_tokens=8,
        keeps_window=True,
        weighs_redundancy=True,
    ),
}
"""Value of ``kv_method`` → its facts."""


def methods_without_keys() -> list[str]:
    """Names of the methods that know where without the teacher."""
    return [name for name, method in SELECTION_METHODS.items() if not method.reads_keys]


def default_observers() -> str:
    """What ``observing_tokens`` means where it is unset, method by method."""
    return "; ".join(
        f"{name}: the last {method.observing_tokens} of the {method.observers}"
        for name, method in SELECTION_METHODS.items()
        if method.observing_tokens
    )
