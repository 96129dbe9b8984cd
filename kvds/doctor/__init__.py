"""Doctor: is this machine fit for a run? Checks with a level, what was found, and a remedy."""
