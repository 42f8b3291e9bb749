"""Pair tables from files or memory: reading, validation, splits, text, summaries."""
