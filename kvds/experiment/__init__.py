"""What runs left behind, read back and compared."""
