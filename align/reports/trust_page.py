"""Page of `align trust`: one HTML file, without script or request, with every text escaped."""

from pathlib import Path
from typing import Any

from align.io.files import write_text
from align.reports import plots
from align.reports.html import environment

TITLES = {
    "labels": "How much do the labels tell?",
    "margin": "How much do the margins tell?",
    "both": "And both together?",
    "against": "What to expect of the mix of both",
    "source": "Where do the margins come from?",
    "more": "Would more pairs change the verdict?",
    "shared": "Do the margins have errors in common?",
}


def write_trust_page(target: Path, found: dict[str, Any]) -> None:
    """Render the page.

    Args:
        target: the file.
        found: content of trust.json.
    """
    page = environment().get_template("trust.html.j2").render(found=found, titles=TITLES, plots=trust_plots(found))
    write_text(target, page)


def trust_plots(found: dict[str, Any]) -> dict[str, Any]:
    """Held-out log-likelihood against the trust, and the learning curves."""
    curve = found["curve"]
    share = [100 * point["share"] for point in curve]
    lines = {name: (share, [point[name] for point in curve]) for name in ("labels", "chosen")}
    return {
        "grid": plots.trust_over_settings(found["grid"]),
        "curve": plots.lines(
            lines,
            x_title="share of the pairs trained on (%)",
            y_title="gain over a coin (nats per pair)",
            zero=True,
        ),
    }
