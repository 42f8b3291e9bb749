"""Reward against KL: labels cover neither dots nor each other, and a shared point is drawn once."""

import re

import numpy as np
import pytest

from align.reports.frontier import LETTER, LINE, RADIUS, Mark, frontier
from align.reports.plots import COLORS, color

TITLES = {"x_title": "KL", "y_title": "reward"}


def mark(x: float, y: float, label: str = "") -> Mark:
    """A point with an interval of 0.2."""
    return Mark(x, (y - 0.1, y, y + 0.1), f"hover {label}", label)


def labels(svg: str) -> list[tuple[float, float, str]]:
    """Left end, baseline and text of every label."""
    return [
        (float(x), float(y), t) for x, y, t in re.findall(r'<text class="mark" x="(.*?)" y="(.*?)">(.*?)</text>', svg)
    ]


def dots(svg: str) -> list[tuple[float, float]]:
    """Centers of the dots."""
    return [(float(x), float(y)) for x, y in re.findall(r'<circle class="c\d+ dot" cx="(.*?)" cy="(.*?)"', svg)]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("spread", [0.0, 0.02, 1.0])
def test_labels_cover_neither_dots_nor_each_other(seed: int, spread: float) -> None:
    generator = np.random.default_rng(seed)
    points = [(float(1 + spread * a), float(spread * b)) for a, b in generator.random((12, 2))]
    marks = [mark(x, y, f"step {k}") for k, (x, y) in enumerate(points)]
    svg = str(frontier({"dpo": marks[:6], "dpo checkpoints": marks[6:]}, methods=["dpo"], **TITLES))
    placed, centers = labels(svg), dots(svg)
    assert len(placed) == 12 or spread < 1
    assert placed, "near points have at least one label"
    boxes = [(x, y + 3 - LINE, x + LETTER * len(text), y + 3) for x, y, text in placed]
    boxes += [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in centers]
    for k in range(len(placed)):
        for other in range(k + 1, len(boxes)):
            a, b = boxes[k], boxes[other]
            apart = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            assert min(apart) < 0.11, (placed[k], other)


def test_a_shared_point_keeps_the_color_of_the_first_series() -> None:
    start = mark(0.0, 1.0, "1")
    svg = str(
        frontier({"reference": [start], "dpo checkpoints": [mark(0.0, 1.0), mark(1.0, 2.0)]}, methods=["dpo"], **TITLES)
    )
    assert svg.count("<circle") == 2 and svg.count('class="c0 dot"') == 1


def test_twelve_methods_have_twelve_colors() -> None:
    names = ["reference", "dpo", "madpo", "soft_madpo", *(f"own{k}" for k in range(COLORS - 4))]
    assert len({color(name, names) for name in names}) == COLORS == 12
