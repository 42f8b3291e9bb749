"""Reproduce the tables and figures of docs/results.md."""
