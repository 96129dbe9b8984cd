"""A model, and an alignment, on held-out rows."""
