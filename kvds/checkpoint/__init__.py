"""What a run leaves on disk and goes on from."""
