"""Handoff: a teacher reads the prompt, a map turns its keys and values into its student's, the student writes on."""

from kvds.handoff.cache_map import CacheMap
from kvds.handoff.calibration import fit_pair
from kvds.handoff.files import load_handoff, load_map, save_map
from kvds.handoff.model import HandoffModel

__all__ = ["CacheMap", "HandoffModel", "fit_pair", "load_handoff", "load_map", "save_map"]
