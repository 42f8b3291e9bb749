"""Figures as SVG files that are the same, byte for byte, whenever they are drawn from the same numbers."""

from pathlib import Path
from typing import Any


def pyplot(salt: str) -> Any:
    """matplotlib's pyplot, set up for SVG; ``salt`` makes the ids in the file the same in every run."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": salt, "svg.fonttype": "none"})
    return plt


def save(figure: Any, target: Path) -> None:
    """Write ``figure`` without a date, by way of a temporary file, and close it."""
    import matplotlib.pyplot as plt

    temporary = target.with_suffix(".partial")
    figure.savefig(temporary, format="svg", metadata={"Date": None})
    temporary.replace(target)
    plt.close(figure)
