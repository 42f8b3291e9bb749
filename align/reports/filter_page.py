"""Page of a filter: one HTML file, without script or request, with every text escaped."""

from pathlib import Path
from typing import Any

import numpy as np

from align.data.text import cells, plain
from align.filtering.selection import top_k
from align.filtering.tables import Filtered
from align.io.files import write_text
from align.reports import plots
from align.reports.html import environment

BORDER = 6
MAP_POINTS = 1200
PCA_ROWS = 20_000
BY_RULE = "broke a rule"
SHADES = {"kept": "c1", "dropped": "c2"}
"""CSS classes that ``plots.scatter`` gives the first two series."""
SHOWN_CHARACTERS = 120


def write_filter_page(target: Path, found: Filtered, source: str) -> None:
    """Render the page.

    Args:
        target: the file.
        found: all pairs with their scores and ``kept``.
        source: path or id that the pairs were read from.
    """
    scored = np.isfinite(found.columns["importance"])
    columns = {name: np.asarray(values) for name, values in found.columns.items() if values.dtype.kind == "f"}
    if "margin" in found.pairs.column_names:
        columns = {"margin": cells(found.pairs, "margin").to_numpy().astype(np.float64)} | columns
    drawn = {}
    for name, values in columns.items():
        usable = scored & np.isfinite(values)
        series = {label: values[usable & (found.kept == kept)] for label, kept in (("kept", True), ("dropped", False))}
        if usable.any():
            drawn[name] = plots.histogram(series, x_title=name, shades=SHADES)
    page = (
        environment()
        .get_template("filter.html.j2")
        .render(
            source=source,
            summary=found.summary,
            plots=drawn,
            map=embedding_map(found),
            border=_border(found, scored),
            rules=_examples(found, scored),
        )
    )
    write_text(target, page)


def embedding_map(found: Filtered) -> Any:
    """The prompts on their first two principal components, colored by kept, dropped or broken rule."""
    rng = np.random.default_rng(0)
    count = len(found.kept)
    axes, center, share = _principal_plane(found.vectors, rng)
    rows = np.sort(rng.choice(count, min(count, MAP_POINTS), replace=False))
    plane = (np.asarray(found.vectors[rows]) - center) @ axes
    scored = np.isfinite(found.columns["importance"][rows])
    fate = np.where(found.kept[rows], "kept", np.where(scored, "dropped", BY_RULE))
    prompts = found.pairs.select(rows)["prompt"]
    points = {
        label: [
            (float(x), float(y), plain(prompt)[:SHOWN_CHARACTERS])
            for (x, y), prompt, what in zip(plane, prompts, fate, strict=True)
            if what == label
        ]
        for label in ("kept", "dropped", BY_RULE)
    }
    titles = [f"principal component {k + 1} ({100 * part:.0f}% of the variance)" for k, part in enumerate(share)]
    return plots.scatter({k: v for k, v in points.items() if v}, x_title=titles[0], y_title=titles[1])


def _principal_plane(vectors: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Axes [D, 2], center [D] and explained variance ratio [2], from at most ``PCA_ROWS`` rows; signs are fixed."""
    rows = np.sort(rng.choice(len(vectors), min(len(vectors), PCA_ROWS), replace=False))
    sample = np.asarray(vectors[rows], dtype=np.float64)
    center = sample.mean(axis=0)
    values, directions = np.linalg.eigh((sample - center).T @ (sample - center))
    axes = directions[:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    return axes, center, values[:-3:-1] / max(values.sum(), 1e-12)


def _border(found: Filtered, scored: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """The kept pairs with the smallest and the dropped pairs with the largest importance."""
    importance = found.columns["importance"]
    kept, dropped = np.flatnonzero(found.kept), np.flatnonzero(scored & ~found.kept)
    least = kept[top_k(-importance[kept], kept, BORDER)]
    most = dropped[top_k(importance[dropped], dropped, BORDER)]
    least = least[np.argsort(importance[least], kind="stable")]
    most = most[np.argsort(-importance[most], kind="stable")]
    return {"just kept": [_text(found, k) for k in least], "just dropped": [_text(found, k) for k in most]}


def _examples(found: Filtered, scored: np.ndarray) -> list[dict[str, Any]]:
    """One pair for each rule that dropped any, then more dropped pairs up to ``BORDER``."""
    broken = np.flatnonzero(~scored)
    rules = [found.reasons.broken[k][0] for k in broken.tolist()]
    _, first = np.unique(rules, return_index=True) if rules else ([], np.empty(0, dtype=np.int64))
    more = [k for k in range(len(broken)) if k not in first]
    return [_text(found, broken[k]) for k in [*first, *more[: max(BORDER - len(first), 0)]]]


def _text(found: Filtered, row: int) -> dict[str, Any]:
    pair = found.pairs[int(row)]
    parts = {part: plain(pair[part]) for part in ("prompt", "chosen", "rejected")}
    importance = float(found.columns["importance"][row])
    return parts | {
        "id": pair["id"],
        "reason": found.reasons.of([row])[0],
        "importance": importance if np.isfinite(importance) else None,
    }
