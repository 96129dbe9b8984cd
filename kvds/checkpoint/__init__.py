"""Checkpoints: what a run leaves on disk and goes on from."""
