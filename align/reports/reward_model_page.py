"""Metrics of a reward model -> one HTML file; no script, no request, every text escaped."""

from pathlib import Path
from typing import Any

import numpy as np

from align.reports import plots
from align.reports.page import environment


def write_page(target: Path, found: dict[str, Any], margins: np.ndarray) -> None:
    """Render the page by way of a temporary file.

    Args:
        target: the file.
        found: what ``reward_model_metrics`` gives, and ``run``.
        margins: reward of the chosen minus reward of the rejected response, [N].
    """
    drawn = {
        "margins": plots.histogram({"margins": margins.tolist()}, x_title="reward margin m"),
        "reliability": plots.reliability({"margins": found["bins"]}),
    }
    page = environment().get_template("reward_model.html.j2").render(report=found, plots=drawn)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(target)
