"""Page of a reward model: one HTML file, without script or request, with every text escaped."""

from pathlib import Path
from typing import Any

import numpy as np

from align.io.files import write_text
from align.reports import plots
from align.reports.html import environment

GROUPS = 7
"""Number of groups, the largest ones, with a histogram of their own."""


def write_reward_model_page(
    target: Path, found: dict[str, Any], margins: np.ndarray, *, groups: list[str] | None, words: np.ndarray
) -> None:
    """Render the page.

    Args:
        target: the file.
        found: results of ``reward_model_metrics`` and ``pair_findings``, and ``run``.
        margins: reward of the chosen minus reward of the rejected response, [N].
        groups: category of each pair, [N], or None.
        words: words of the chosen minus words of the rejected response, [N].
    """
    dots = [
        (float(x), float(y), f"{x:+.0f} words, margin {y:.3g}") for x, y in zip(words.tolist(), margins, strict=True)
    ]
    series = by_group(margins, groups)
    shades = {name: f"c{k}" for k, name in enumerate(series)} if groups is not None else None
    drawn = {
        "margins": plots.histogram(series, x_title="reward margin m", shades=shades),
        "reliability": plots.reliability({"margins": found["bins"]}),
        "length": plots.scatter({"pairs": dots}, x_title="words, chosen minus rejected", y_title="reward margin m"),
        "ood": None,
    }
    if found["ood"] is not None:
        distances = {"pairs": found["ood"]["distances"]}
        drawn["ood"] = plots.histogram(distances, x_title="distance to the training pairs")
    page = environment().get_template("reward_model.html.j2").render(report=found, plots=drawn)
    write_text(target, page)


def by_group(margins: np.ndarray, groups: list[str] | None) -> dict[str, list[float]]:
    """Margins of the ``GROUPS`` largest groups and of the others together; without groups, of all pairs."""
    if groups is None:
        return {"margins": margins.tolist()}
    names = np.asarray(groups)
    kinds, counts = np.unique(names, return_counts=True)
    largest = [str(kinds[k]) for k in np.argsort(-counts, kind="stable")[:GROUPS]]
    made = {name: margins[names == name].tolist() for name in largest}
    rest = margins[~np.isin(names, largest)]
    return made | ({"other groups": rest.tolist()} if rest.size else {})
