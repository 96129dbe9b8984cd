"""Rules of one's own data: columns, and rows read as a stream."""

from __future__ import annotations

from collections.abc import Iterator

from kvds.config.all_settings import AllSettings
from kvds.config.setting_rules import Rule
from kvds.config.values import parse_columns


def data_rules(cfg: AllSettings) -> Iterator[Rule]:
    """Columns that can be read, as many as they must be; a stream that ends.

    Raises:
        InputError: a text that names no columns.
    """
    for text in cfg.columns:
        parse_columns(text)
    count, names = len(cfg.columns), len(cfg.datasets)
    expected = f"one for all data sets, or one for each of the {names} of --datasets (auto: by their names)"
    yield count in (0, 1, names), "columns", " ".join(cfg.columns), expected
    if cfg.streaming:
        yield (
            cfg.subset_size is not None,
            "streaming",
            True,
            "--subset_size N, the rows that are taken (or --no_streaming)",
        )
