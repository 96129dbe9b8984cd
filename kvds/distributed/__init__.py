"""The ranks of a run: how they find each other, stop together and learn of one that is lost."""
