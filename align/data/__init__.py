"""Pair tables: reading, validation, splits, text, statistics."""
