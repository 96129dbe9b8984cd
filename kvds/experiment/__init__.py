"""Experiments: arms × seeds, run, kept and compared."""
