"""Keys and values of a model as data: shapes, capture, selection of positions, groups."""

from kvds.kv.capture import KVCapture
from kvds.kv.gather import gather_positions, group_slices
from kvds.kv.hidden import HiddenCapture, HiddenStates, hidden_shape
from kvds.kv.reading import Capture, States, open_capture
from kvds.kv.select import Selection, select_tokens, selected_count
from kvds.kv.shuffle import shuffled_states
from kvds.kv.states import KVShape, KVStates

__all__ = [
    "Capture",
    "HiddenCapture",
    "HiddenStates",
    "KVCapture",
    "KVShape",
    "KVStates",
    "Selection",
    "States",
    "gather_positions",
    "group_slices",
    "hidden_shape",
    "open_capture",
    "select_tokens",
    "selected_count",
    "shuffled_states",
]
