"""Margin-adaptive preference alignment. Importing this package loads nothing heavy; a name loads when it is used."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

NAMES = {
    "advise": "align.api",
    "compare_policies": "align.api",
    "filter_pairs": "align.api",
    "measure_entanglement": "align.api",
    "measure_trust": "align.api",
    "pairs_from_dataset": "align.api",
}
"""Public name -> the module that has it."""


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(NAMES[name]), name)
    globals()[name] = found
    return found
