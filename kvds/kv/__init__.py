"""Keys and values of a model as data: shapes, capture, selection of positions, groups."""

from kvds.kv.capture import KVCapture
from kvds.kv.draws import row_draws
from kvds.kv.forward_capture import Capture, Watched
from kvds.kv.gather import gather_positions, group_slices
from kvds.kv.hidden import HiddenCapture, HiddenStates, hidden_shape
from kvds.kv.observed import Observed, ObservingRows
from kvds.kv.pool import common_reasoning_steps, pool_reasoning_steps
from kvds.kv.queries import AttentionStates, LayerQueries
from kvds.kv.reading import States, open_capture
from kvds.kv.select import Selection, observing_rows, select_tokens, selected_count, selected_shares
from kvds.kv.shuffle import shuffled_states
from kvds.kv.states import KVShape, KVStates

__all__ = [
    "AttentionStates",
    "Capture",
    "HiddenCapture",
    "HiddenStates",
    "KVCapture",
    "KVShape",
    "KVStates",
    "LayerQueries",
    "Observed",
    "ObservingRows",
    "Selection",
    "States",
    "Watched",
    "common_reasoning_steps",
    "gather_positions",
    "group_slices",
    "hidden_shape",
    "open_capture",
    "pool_reasoning_steps",
    "observing_rows",
    "row_draws",
    "select_tokens",
    "selected_count",
    "selected_shares",
    "shuffled_states",
]
