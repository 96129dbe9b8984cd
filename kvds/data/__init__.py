"""Rows to learn from: corpora, the built-in problems, their text template, and batches with segments."""
