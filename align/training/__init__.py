"""Alignment of a policy on weighted preference pairs."""
