"""Checks of what only a GPU can show: one command, one JSON file and one page."""
