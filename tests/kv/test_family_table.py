"""The page of families says what tests cover, no more and no less."""

from __future__ import annotations

from kvds.kv.families import FAMILIES
from tests.harness.family_table import PAGE, page
from tests.harness.heads_ranks import FAMILIES as DEALT_OUT
from tests.kv.test_capture import CONFIGS
from tests.kv.test_row_attention import CASES


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "python -m tests.harness.family_table"


def test_every_family_is_held_against_its_cache_and_its_rows() -> None:
    assert set(CONFIGS) == set(FAMILIES) == {family for family, _ in CASES}
    assert set(DEALT_OUT) == {name for name, family in FAMILIES.items() if family.tensor_parallel}
