"""Reward against KL as inline SVG: one path of marks per series, whose labels do not cover each other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from align.reports.plots import HEIGHT, WIDTH, Axes, color, dash, figure, method, widened

LETTER, LINE = 6.5, 13.0
"""Width of a letter of a label, on average, and height of a line; pixels of the plot."""
RADIUS = 4.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a frontier."""

    x: float
    y: tuple[float, float, float]
    """Lower end of its interval, value, upper end."""
    hover: str
    label: str = ""
    """Drawn next to the point where it fits."""


Box = tuple[float, float, float, float]
"""Left, top, right, bottom; pixels."""


def frontier(
    curves: Mapping[str, Sequence[Mark]],
    *,
    methods: Sequence[str],
    x_title: str,
    y_title: str,
) -> Markup:
    """One path of marks per series.

    A series called ``<method> checkpoints`` is a dashed line in the color of the method among all ``methods`` of the
    page. A point that two series share is drawn once, in the color of the first. A label that fits nowhere beside its
    point is left out; its text under the pointer stays.
    """
    names = [name for name, points in curves.items() if points]
    shades = {name: color(method(name), methods) for name in names}
    xs = np.array([mark.x for name in names for mark in curves[name]])
    ys = np.array([mark.y for name in names for mark in curves[name]])
    axes = Axes(widened(np.append(xs, 0.0), 0.08), widened(ys.ravel()), x_title, y_title)
    body: list[str] = []
    dots: dict[tuple[float, tuple[float, float, float]], tuple[str, Mark]] = {}
    for name, shade in shades.items():
        path = " ".join(f"{axes.px(mark.x):.1f},{axes.py(mark.y[1]):.1f}" for mark in curves[name])
        body.append(f'<polyline class="{shade} line{dash(name)}" points="{path}"/>')
        for mark in curves[name]:
            dots.setdefault((mark.x, mark.y), (shade, mark))
    placed = [_around(axes.px(mark.x), axes.py(mark.y[1])) for _, mark in dots.values()]
    for shade, mark in dots.values():
        at = axes.px(mark.x)
        low, middle, high = (axes.py(value) for value in mark.y)
        body.append(
            f'<line class="{shade} line thin" x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            f'<circle class="{shade} dot" cx="{at:.1f}" cy="{middle:.1f}" r="{RADIUS:g}">'
            f"<title>{escape(mark.hover)}</title></circle>"
        )
    for name in names:
        for mark in curves[name]:
            box = _free(mark, axes, placed) if mark.label else None
            if box is not None:
                placed.append(box)
                body.append(f'<text class="mark" x="{box[0]:.1f}" y="{box[3] - 3:.1f}">{escape(mark.label)}</text>')
    return figure(axes, body, names, shades)


def _around(x: float, y: float) -> Box:
    """The box of a dot."""
    return x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS


def _free(mark: Mark, axes: Axes, placed: Sequence[Box]) -> Box | None:
    """The first place beside a mark where its label covers no dot and no label; None if there is none."""
    x, y = axes.px(mark.x), axes.py(mark.y[1])
    return next((box for box in _places(x, y, LETTER * len(mark.label)) if _fits(box, placed)), None)


def _places(x: float, y: float, width: float) -> Iterator[Box]:
    """Boxes right and left of a point, above and below, near ones first."""
    for distance in (RADIUS + 1, RADIUS + 1 + LINE, RADIUS + 1 + 2 * LINE):
        for left in (x + RADIUS + 2, x - RADIUS - 2 - width):
            yield left, y - distance - LINE + 4, left + width, y - distance + 4
            yield left, y + distance - 4, left + width, y + distance - 4 + LINE


def _fits(box: Box, placed: Sequence[Box]) -> bool:
    if box[0] < 0 or box[1] < 0 or box[2] > WIDTH or box[3] > HEIGHT:
        return False
    return all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in placed)
