"""Plots as inline SVG without library or script; colors are CSS classes of the page, for light and dark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from align.reports.verdict import name as written

FEW_POINTS = 12
"""Points of a curve, at most, that are drawn as dots: a line alone would look measured everywhere."""
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 14, 46
TICKS = 5
FIXED_COLORS = {"reference": 0, "dpo": 1, "madpo": 2, "soft_madpo": 3}
COLORS = 12
"""Of the pages; methods beyond these share a color with another one."""
MOST_POINTS = 400


@dataclass(frozen=True, slots=True)
class Axes:
    """Ranges and titles of a plot; data coordinates -> pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_title: str
    y_title: str

    def px(self, value: float) -> float:
        """Horizontal pixel of a value."""
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        """Vertical pixel of a value."""
        low, high = self.y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def color(name: str, names: Sequence[str]) -> str:
    """CSS class of a series: a method has the same color on all pages."""
    if name in FIXED_COLORS:
        return f"c{FIXED_COLORS[name]}"
    others = [other for other in names if other not in FIXED_COLORS]
    return f"c{len(FIXED_COLORS) + others.index(name) % (COLORS - len(FIXED_COLORS))}"


def histogram(
    series: Mapping[str, Sequence[float]], *, x_title: str, shades: Mapping[str, str] | None = None
) -> Markup:
    """Histograms of the series over common bins, overlaid, as shares of each series.

    Args:
        series: name -> values.
        x_title: title of the horizontal axis.
        shades: name -> CSS class of its color; default: ``color``.
    """
    names = [name for name, values in series.items() if len(values)]
    pooled = np.concatenate([np.asarray(series[name]) for name in names])
    low, high = np.quantile(pooled, [0.002, 0.998])
    edges = np.linspace(low, high if high > low else low + 1.0, 41)
    shares = {name: np.histogram(np.clip(series[name], edges[0], edges[-1]), edges)[0] for name in names}
    shares = {name: counts / counts.sum() for name, counts in shares.items()}
    axes = Axes(
        (edges[0], edges[-1]), (0.0, 1.05 * max(float(s.max()) for s in shares.values())), x_title, "share of pairs"
    )
    body = []
    for name in names:
        points = []
        for k, share in enumerate(shares[name]):
            points += [(axes.px(edges[k]), axes.py(share)), (axes.px(edges[k + 1]), axes.py(share))]
        path = " ".join(
            f"{x:.1f},{y:.1f}" for x, y in [(points[0][0], axes.py(0)), *points, (points[-1][0], axes.py(0))]
        )
        body.append(
            f'<polygon class="{(shades or {}).get(name, color(name, names))} area" points="{path}"><title>{escape(name)}</title></polygon>'
        )
    if low < 0 < high:
        body.append(_vertical(axes, 0.0))
    return figure(axes, body, names, shades)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_title: str, y_title: str, zero: bool = False,
    share: bool = False,
) -> Markup:  # fmt: skip
    """One curve per series of (x, y), with a dot at each point if there are few; ``share``: y is from 0 to 1."""
    names = list(series)
    xs = np.concatenate([np.asarray(x, dtype=float) for x, _ in series.values()])
    ys = np.concatenate([np.asarray(y, dtype=float) for _, y in series.values()])
    ys = np.append(ys, 0.0) if zero else ys
    axes = Axes(widened(xs, 0.0), (0.0, 1.0) if share else widened(ys), x_title, y_title)
    body = [_horizontal(axes, 0.0)] if zero else []
    mark = "dot" if max(len(x) for x, _ in series.values()) <= FEW_POINTS else "hit"
    for name, (x, y) in series.items():
        path = " ".join(f"{axes.px(a):.1f},{axes.py(b):.1f}" for a, b in zip(x, y, strict=True))
        body.append(
            f'<polyline class="{color(method(name), [method(n) for n in names])} line{dash(name)}" points="{path}"/>'
        )
        body += [
            f'<circle class="{color(method(name), [method(n) for n in names])} {mark}" cx="{axes.px(a):.1f}" '
            f'cy="{axes.py(b):.1f}" r="3"><title>{escape(name)}: {a:g}, {b:.4g}</title></circle>'
            for a, b in _thin(list(zip(x, y, strict=True)))
        ]
    return figure(axes, body, names)


def intervals(
    points: Mapping[str, tuple[float, tuple[float, float, float]]],
    *,
    x_title: str,
    y_title: str,
    groups: Mapping[str, tuple[str, str]] | None = None,
) -> Markup:
    """One point per series: x, and (low, value, high) in y with its interval drawn.

    ``groups``: series -> the group whose color and legend it has, and the label beside its point; None: a color each.
    """
    names = list(points) if groups is None else list(dict.fromkeys(group for group, _ in groups.values()))
    xs = np.array([x for x, _ in points.values()])
    ys = np.array([y for _, y in points.values()])
    axes = Axes(widened(np.append(xs, 0.0), 0.12), widened(ys.ravel()), x_title, y_title)
    body = []
    for name, (x, (low, value, high)) in points.items():
        group, label = (name, "") if groups is None else groups[name]
        shade, at = color(group, names), axes.px(x)
        if label:
            body.append(f'<text class="mark" x="{at + 7:.1f}" y="{axes.py(value) - 6:.1f}">{escape(label)}</text>')
        body.append(
            f'<line class="{shade} line" x1="{at:.1f}" x2="{at:.1f}" y1="{axes.py(low):.1f}" y2="{axes.py(high):.1f}"/>'
        )
        body.append(
            f'<circle class="{shade} dot" cx="{at:.1f}" cy="{axes.py(value):.1f}" r="5">'
            f"<title>{escape(name)}: {x:.3g}, {value:.3g} ({low:.3g} to {high:.3g})</title></circle>"
        )
    return figure(axes, body, names)


def interval_lines(
    series: Mapping[str, Sequence[tuple[float, tuple[float, float, float]]]], *, x_title: str, y_title: str
) -> Markup:
    """One curve per series of (x, (low, value, high)), with its intervals drawn."""
    names = list(series)
    xs = np.array([x for points in series.values() for x, _ in points])
    ys = np.array([y for points in series.values() for _, y in points])
    axes = Axes(widened(xs, 0.02), widened(ys.ravel()), x_title, y_title)
    body = []
    for name, points in series.items():
        shade = color(method(name), [method(n) for n in names])
        path = " ".join(f"{axes.px(x):.1f},{axes.py(y[1]):.1f}" for x, y in points)
        body.append(f'<polyline class="{shade} line{dash(name)}" points="{path}"/>')
        for x, (low, value, high) in points:
            at = axes.px(x)
            hover = escape(f"{name}: {x:g}, {value:.4g} ({low:.3g} to {high:.3g})")
            body.append(
                f'<line class="{shade} line thin" x1="{at:.1f}" x2="{at:.1f}" y1="{axes.py(low):.1f}" '
                f'y2="{axes.py(high):.1f}"/><circle class="{shade} dot" cx="{at:.1f}" cy="{axes.py(value):.1f}" r="4">'
                f"<title>{hover}</title></circle>"
            )
    return figure(axes, body, names)


def error_lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]], *, x_title: str, y_title: str
) -> Markup:
    """One curve per series of (x, y, standard error of y), with error bars."""
    names = list(series)
    xs = np.concatenate([np.asarray(x, dtype=float) for x, *_ in series.values()])
    bounds = np.concatenate([np.asarray(y) + sign * np.asarray(e) for _, y, e in series.values() for sign in (-1, 1)])
    axes = Axes(widened(xs, 0.02), widened(bounds), x_title, y_title)
    body = []
    for name, points in series.items():
        shade = color(name, names)
        path = " ".join(f"{axes.px(a):.1f},{axes.py(b):.1f}" for a, b, _ in zip(*points, strict=True))
        body.append(f'<polyline class="{shade} line" points="{path}"/>')
        for a, b, error in zip(*points, strict=True):
            at, low, high = axes.px(a), axes.py(b - error), axes.py(b + error)
            body.append(f'<line class="{shade} line" x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
            body.append(
                f'<circle class="{shade} dot" cx="{at:.1f}" cy="{axes.py(b):.1f}" r="3.5">'
                f"<title>{escape(name)}: {a:g}, {b:.4f} (standard error {error:.4f})</title></circle>"
            )
    return figure(axes, body, names)


def trust_over_settings(grid: Sequence[Mapping[str, float]]) -> Markup:
    """Held-out log-likelihood against the trust, a curve per strength of MADPO's weight; all meet at trust 1."""
    end = next(one for one in grid if one["trust"] == 1)
    series = {}
    for strength in sorted({one["strength"] for one in grid}):
        points = [one for one in grid if one["strength"] == strength and one["trust"] < 1] + [end]
        trust, loglik, error = ([point[name] for point in points] for name in ("trust", "loglik", "error"))
        series[f"g={strength:g}"] = (trust, loglik, error)
    return error_lines(
        series, x_title="trust t in the margin", y_title="log-likelihood of held-out labels (nats per pair)"
    )


def weight_curve(margins: Sequence[float], weights: Mapping[str, Sequence[float]]) -> Markup:
    """Weight of each pair against its margin, above the histogram of the margins."""
    names = list(weights)
    margin = np.asarray(margins)
    top = max(1.2, max(float(np.max(values)) for values in weights.values()) * 1.05)
    axes = Axes(widened(margin), (0.0, top), "reward margin m", "weight w(m)")
    counts, edges = np.histogram(margin, 40)
    body = [
        f'<rect class="under" x="{axes.px(edges[k]):.1f}" width="{axes.px(edges[k + 1]) - axes.px(edges[k]):.1f}" '
        f'y="{axes.py(0.45 * top * count / counts.max()):.1f}" '
        f'height="{axes.py(0) - axes.py(0.45 * top * count / counts.max()):.1f}"><title>{count} pairs</title></rect>'
        for k, count in enumerate(counts)
    ]
    body.append(_horizontal(axes, 1.0))
    order = np.argsort(margin)
    for name in names:
        for k in _thin(list(order)):
            body.append(
                f'<circle class="{color(name, names)} dot" cx="{axes.px(margin[k]):.1f}" cy="{axes.py(weights[name][k]):.1f}" '
                f'r="2"><title>m {margin[k]:.3g}, w {weights[name][k]:.3g}</title></circle>'
            )
    return figure(axes, body, names)


def reliability(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> Markup:
    """Reliability diagram: accuracy against confidence; calibrated margins lie on the diagonal."""
    names = list(bins)
    axes = Axes((0.5, 1.0), (0.0, 1.02), "confidence sigmoid(|m|)", "accuracy")
    body = [
        f'<line class="rule" x1="{axes.px(0.5):.1f}" y1="{axes.py(0.5):.1f}" x2="{axes.px(1):.1f}" y2="{axes.py(1):.1f}"/>'
    ]
    for name in names:
        points = [(item["confidence"], item["accuracy"], item["count"]) for item in bins[name]]
        path = " ".join(f"{axes.px(x):.1f},{axes.py(y):.1f}" for x, y, _ in points)
        body.append(f'<polyline class="{color(name, names)} line" points="{path}"/>')
        body += [
            f'<circle class="{color(name, names)} dot" cx="{axes.px(x):.1f}" cy="{axes.py(y):.1f}" r="4">'
            f"<title>{escape(name)}: confidence {x:.2f}, accuracy {y:.2f}, {count} pairs</title></circle>"
            for x, y, count in points
        ]
    return figure(axes, body, names)


def scatter(
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    *,
    x_title: str,
    y_title: str,
    bounds: Sequence[Sequence[tuple[float, float]]] = (),
    x: tuple[float, float] | None = None,
) -> Markup:
    """One dot per (x, y, hover text) of each series; dashed ``bounds`` are clipped to the range of the points."""
    names = [name for name, values in points.items() if values]
    found = np.array([(a, b) for name in names for a, b, _ in points[name]], dtype=float)
    axes = Axes(x or widened(found[:, 0]), widened(found[:, 1]), x_title, y_title)
    body = []
    for bound in bounds:
        inside = [(a, b) for a, b in bound if axes.x[0] <= a <= axes.x[1] and axes.y[0] <= b <= axes.y[1]]
        path = " ".join(f"{axes.px(a):.1f},{axes.py(b):.1f}" for a, b in inside)
        body.append(f'<polyline class="rule bound" points="{path}"/>')
    if axes.y[0] < 0 < axes.y[1]:
        body.append(_horizontal(axes, 0.0))
    if axes.x[0] < 0 < axes.x[1]:
        body.append(_vertical(axes, 0.0))
    for name in names:
        body += [
            f'<circle class="c{names.index(name) + 1} dot" cx="{axes.px(a):.1f}" cy="{axes.py(b):.1f}" r="3">'
            f"<title>{escape(text)}</title></circle>"
            for a, b, text in _thin(list(points[name]))
        ]
    return figure(axes, body, names, {name: f"c{k + 1}" for k, name in enumerate(names)})


def figure(axes: Axes, body: Sequence[str], names: Sequence[str], shades: Mapping[str, str] | None = None) -> Markup:
    """The SVG with its axes and a legend; everything that is not a number is escaped."""
    parts = []
    for value in _ticks(*axes.x):
        parts.append(
            f'<text class="tick" x="{axes.px(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
        )
    for value in _ticks(*axes.y):
        y = axes.py(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(
        f'<text class="title" x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(axes.x_title)}</text>'
    )
    parts.append(
        f'<text class="title" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(axes.y_title)}</text>'
    )
    methods = [method(name) for name in names]
    shades = shades or {name: color(method(name), methods) for name in names}
    legend = "".join(
        f'<li><svg viewBox="0 0 22 10" width="22" height="10"><line class="{shades[name]} line{dash(name)}" '
        f'x1="0" x2="22" y1="5" y2="5"/></svg>{escape(_legend(name))}</li>'
        for name in names
    )
    label = escape(f"{axes.y_title} against {axes.x_title}")
    svg = f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join([*parts, *body])}</svg>'
    return Markup(f'{svg}<ul class="legend">{legend}</ul>')


def method(name: str) -> str:
    """The method in a series name such as ``madpo rejected``."""
    return name.split(" ", maxsplit=1)[0]


def _legend(name: str) -> str:
    """A series name with the display name of its method."""
    method, blank, rest = name.partition(" ")
    return written(method) + blank + rest


def dash(name: str) -> str:
    return " dash" if name.endswith(("rejected", "checkpoints", "held out", "predicted")) else ""


def _thin(points: list) -> list:
    """At most ``MOST_POINTS`` of the points, evenly spaced."""
    return (
        points
        if len(points) <= MOST_POINTS
        else [points[k] for k in np.linspace(0, len(points) - 1, MOST_POINTS, dtype=int)]
    )


def widened(values: np.ndarray, margin: float = 0.06) -> tuple[float, float]:
    low, high = float(np.min(values)), float(np.max(values))
    room = (high - low) * margin or (0.0 if high > low else 1.0)
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / TICKS
    base = 10.0 ** np.floor(np.log10(raw))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= raw)
    return [float(round(k * step, 10)) for k in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def _vertical(axes: Axes, x: float) -> str:
    return f'<line class="rule" x1="{axes.px(x):.1f}" x2="{axes.px(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'


def _horizontal(axes: Axes, y: float) -> str:
    return f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axes.py(y):.1f}" y2="{axes.py(y):.1f}"/>'
