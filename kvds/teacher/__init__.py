"""The fixed side: a model that runs, in parts or ahead, or its keys and values on disk."""
