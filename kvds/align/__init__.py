"""Alignment: from the keys and values of two models to a loss."""

from __future__ import annotations

from kvds.align.aligner import KVAligner, aligner_settings
from kvds.align.build import ALIGNERS, aligner_config_dict, aligner_from_config_dict, build_aligner
from kvds.align.flat import FlatAligner
from kvds.align.group import AlignerGroup, members_of
from kvds.align.hidden import HiddenAligner
from kvds.align.loss import AlignmentLoss
from kvds.align.relation import RelationAligner
from kvds.align.structural_kv import StructuralKVLoss
from kvds.align.structured import MapProjectionAligner

__all__ = [
    "ALIGNERS",
    "AlignerGroup",
    "AlignmentLoss",
    "FlatAligner",
    "HiddenAligner",
    "KVAligner",
    "MapProjectionAligner",
    "RelationAligner",
    "aligner_config_dict",
    "aligner_from_config_dict",
    "aligner_settings",
    "StructuralKVLoss",
    "build_aligner",
    "members_of",
]
