"""Pages of gradient entanglement: one HTML file each, without script or request, with every text escaped."""

import math
from pathlib import Path
from typing import Any

from datasets import Dataset

from align.io.files import write_text
from align.reports import plots
from align.reports.html import environment

CURVE = [k / 60 for k in range(1, 60)]


def write_trace_page(target: Path, report: dict[str, Any]) -> None:
    """Render the measurements at the checkpoints of one method (align/entanglement/trace.py)."""
    _write(target, "trace.html.j2", report=report, plots=_trajectory(report["points"]))


def write_entanglement_page(target: Path, table: Dataset, report: dict[str, Any]) -> None:
    """Render the page.

    Args:
        target: the file.
        table: rows of ``measure_pairs``.
        report: ``run`` (what was measured, how long it took), ``summary``, ``advice``, ``pairs`` (colored text).
    """
    _write(target, "entanglement.html.j2", report=report, plots=_plots(table))


def write_losses_page(target: Path, report: dict[str, Any]) -> None:
    """Render what each loss would do to the same pairs (align/entanglement/compare_losses.py)."""
    _write(target, "losses.html.j2", report=report)


def shade(value: float, largest: float) -> str:
    """CSS class of a token: ``up`` raises the inner product with the other response, ``dn`` lowers it."""
    strength = abs(value) / largest if largest > 0 else 0.0
    level = 3 if strength > 0.5 else 2 if strength > 0.2 else 1 if strength > 0.05 else 0
    return "" if level == 0 else f"{'up' if value > 0 else 'dn'}{level}"


def _write(target: Path, template: str, **values: Any) -> None:
    write_text(target, environment().get_template(template).render(**values))


def _trajectory(points: list[dict[str, float]]) -> list[tuple[str, Any]]:
    def drawn(title: str, y_title: str, names: dict[str, str], zero: bool = False) -> tuple[str, Any]:
        steps = [point["step"] for point in points]
        series = {label: (steps, [point[key] for point in points]) for key, label in names.items()}
        return title, plots.lines(
            series, x_title="optimizer step", y_title=y_title, zero=zero, share=y_title == "share"
        )

    sides = {"chosen_change": "logp chosen", "rejected_change": "logp rejected"}
    return [
        drawn("change of log-prob since the reference", "nats", sides, zero=True),
        drawn("entangled pairs", "share", {"entangled": "entangled", "chosen_falls": "chosen would fall"}, zero=True),
        drawn("cosine of the two gradients (median)", "cosine", {"cosine": "pairs"}),
        drawn("length of the rejected gradient (median)", "|gl| / |gw|", {"norm_ratio": "pairs"}),
    ]


def _plots(table: Dataset) -> dict[str, Any]:
    rows = list(table)
    centered: dict[str, list[tuple[float, float, str]]] = {}
    steps: dict[str, list[tuple[float, float, str]]] = {}
    distance: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        text = f"{row['id']}: {row['verdict']}, cosine {row['cosine']:.2f}, |gl|/|gw| {row['norm_ratio']:.2f}"
        if row["d_w"] > 0 and row["d_l"] > 0 and row["chosen_sq"] > 0 and row["rejected_sq"] > 0:
            height = math.log2(row["norm_ratio"]) - math.log2(row["d_w"] / row["d_l"])
            centered.setdefault(row["verdict"], []).append((row["cosine"], height, text))
        size = math.sqrt(row["chosen_sq"] * row["rejected_sq"]) * max(abs(row["d_w"]), abs(row["d_l"])) or 1.0
        steps.setdefault(row["verdict"], []).append((row["step_chosen"] / size, row["step_rejected"] / size, text))
        distance.setdefault(row["verdict"], []).append((row["token_difference"], row["cosine"], text))
    made = {
        "cosine": plots.histogram({"pairs": [row["cosine"] for row in rows]}, x_title="cosine of gw and gl"),
        "steps": plots.scatter(steps, x_title="change of log p(chosen), scaled", y_title="change of log p(rejected)"),
        "distance": plots.scatter(distance, x_title="difference of the responses (tokens)", y_title="cosine"),
    }
    if centered:
        made["regions"] = plots.scatter(
            centered,
            x_title="cosine of gw and gl",
            y_title="log2 of |gl| d_l / (|gw| d_w)",
            bounds=[[(c, -math.log2(c)) for c in CURVE], [(c, math.log2(c)) for c in CURVE]],
            x=(min(-0.05, *(x for values in centered.values() for x, _, _ in values)), 1.02),
        )
    return made
