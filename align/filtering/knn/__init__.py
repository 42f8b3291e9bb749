"""Nearest-neighbor search: exact, inverted file, recall of the approximate one."""
