"""Rules of the rows and their batches: corpora, padding."""

from __future__ import annotations

from collections.abc import Iterator

from kvds.config.all_settings import AllSettings
from kvds.config.setting_rules import Rule
from kvds.config.values import split_dataset_weight


def batch_rules(cfg: AllSettings) -> Iterator[Rule]:
    """Which rows there are, and how they lie in a batch."""
    yield bool(cfg.datasets), "datasets", "", "at least one corpus, such as --datasets gsm8k"
    names = [split_dataset_weight(spec)[0] for spec in cfg.datasets]
    for name in names:
        yield names.count(name) == 1, "datasets", name, f"each corpus once (to weigh it: {name}:2)"
    expected = f"1 (rows as long as the longest of a batch) to max_length={cfg.max_length}; such as 64"
    yield 1 <= cfg.pad_to_multiple_of <= cfg.max_length, "pad_to_multiple_of", cfg.pad_to_multiple_of, expected
