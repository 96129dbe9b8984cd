"""torch.compile of the oracle: a peer for benchmarks, never chosen by ``impl="auto"``."""

from __future__ import annotations

import torch

from kvds.ops.reference import map_projection_loss_reference, map_projection_reference

map_projection_compiled = torch.compile(map_projection_reference, dynamic=False)
map_projection_loss_compiled = torch.compile(map_projection_loss_reference, dynamic=False)
