"""Margin-adaptive preference alignment. Importing this package loads nothing heavy; each verb imports what it needs."""

__version__ = "0.1.0"
