"""A run's configuration: settings, their rules, recipes and flags, DeepSpeed's files. Knows no model."""

from kvds.config.run_config import SECTIONS, RunConfig
from kvds.config.settings import AlignmentSettings

__all__ = ["SECTIONS", "AlignmentSettings", "RunConfig"]
