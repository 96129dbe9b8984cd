"""The run: built, trained, guarded, evaluated and left."""
