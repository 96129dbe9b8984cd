"""Keys and values of a model as data: shapes, capture, selection of positions, groups."""

from kvds.kv.capture import KVCapture
from kvds.kv.draws import row_draws
from kvds.kv.gather import gather_positions, group_slices
from kvds.kv.observed import Observed, ObservingRows
from kvds.kv.select import Selection, observing_rows, select_tokens, selected_count
from kvds.kv.shares import selected_shares
from kvds.kv.states import KVShape, KVStates

__all__ = [
    "KVCapture",
    "KVShape",
    "KVStates",
    "Observed",
    "ObservingRows",
    "Selection",
    "gather_positions",
    "group_slices",
    "observing_rows",
    "row_draws",
    "select_tokens",
    "selected_count",
    "selected_shares",
]
