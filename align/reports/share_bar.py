"""Shares of a whole as one stacked bar, inline SVG like that of ``align.reports.plots``."""

from collections.abc import Mapping

from markupsafe import Markup, escape

from align.reports.plots import WIDTH


def shares(parts: Mapping[str, tuple[int, str]]) -> Markup:
    """One stacked horizontal bar: label -> (count, CSS class of its color)."""
    total = sum(count for count, _ in parts.values())
    body, legend, at = [], [], 0.0
    for label, (count, shade) in parts.items():
        width = WIDTH * count / total
        title = f"<title>{escape(label)}: {count} of {total}</title>"
        body.append(f'<rect class="{shade} dot" x="{at:.1f}" y="0" width="{width:.1f}" height="26">{title}</rect>')
        legend.append(
            '<li><svg viewBox="0 0 22 10" width="22" height="10">'
            f'<rect class="{shade} dot" width="22" height="10"/></svg>{escape(label)}: {count}</li>'
        )
        at += width
    label = escape(", ".join(f"{name}: {count}" for name, (count, _) in parts.items()))
    svg = f'<svg class="plot" viewBox="0 0 {WIDTH} 26" role="img" aria-label="{label}">{"".join(body)}</svg>'
    return Markup(f'{svg}<ul class="legend">{"".join(legend)}</ul>')
