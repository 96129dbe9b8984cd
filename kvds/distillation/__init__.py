"""The module that DeepSpeed wraps, its losses, and what a step gives it."""
