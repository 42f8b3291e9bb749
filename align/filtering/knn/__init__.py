"""Nearest-neighbor search: exact or by an index, and the recall of the index."""
