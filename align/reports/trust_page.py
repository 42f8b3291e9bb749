"""What `align trust` found -> one HTML file; no script, no request, every text escaped."""

from pathlib import Path
from typing import Any

from align.io.files import write_text
from align.reports import plots
from align.reports.html import environment

TITLES = {
    "labels": "What do the labels carry?",
    "margin": "What do the margins carry?",
    "both": "And both together?",
    "against": "What to expect of the mix",
    "source": "Where do the margins come from?",
    "more": "Would more pairs change the verdict?",
    "shared": "Do the margins share an error?",
}


def write_trust_page(target: Path, found: dict[str, Any]) -> None:
    """Render the page.

    Args:
        target: the file.
        found: what `align trust` wrote to trust.json.
    """
    page = environment().get_template("trust.html.j2").render(found=found, titles=TITLES, plots=trust_plots(found))
    write_text(target, page)


def trust_plots(found: dict[str, Any]) -> dict[str, Any]:
    """Held-out log-likelihood over the trust, and the learning curves."""
    curve = found["curve"]
    share = [100 * point["share"] for point in curve]
    lines = {name: (share, [point[name] for point in curve]) for name in ("labels", "chosen")}
    return {
        "grid": plots.trust_over_settings(found["grid"]),
        "curve": plots.lines(
            lines, x_title="share of the pairs trained on (%)", y_title="nats a pair over a coin", zero=True
        ),
    }
