"""The fused operation: projection of keys or values through layer, head and dimension maps, and its loss."""

from kvds.ops.map_projection import map_projection, map_projection_loss

__all__ = ["map_projection", "map_projection_loss"]
