"""Benchmark scores before and after training, as the tables and the sentences of a page."""

from collections.abc import Mapping
from typing import Any

from align.reports.verdict import name
from align.stats import excludes, interval

NO_MEAN = "a metric is no mean over documents"
"""The reason in reports that do not hold it."""


def benchmark_tables(section: Mapping[str, Any] | None) -> dict[str, list[dict[str, Any]]]:
    """Policy -> its rows, the main metric of each task first; a row is marked where its interval excludes 0."""
    if section is None:
        return {}
    return {key: [_row(row) for row in found["rows"]] for key, found in section["policies"].items()}


def benchmark_sentences(section: Mapping[str, Any]) -> list[str]:
    """What happened to each policy's benchmarks, on average and task by task."""
    return [_sentence(key, found) for key, found in section["policies"].items()]


def _sentence(key: str, found: Mapping[str, Any]) -> str:
    main = [row for row in found["rows"] if row["main"] and row["inside"] is None]
    beyond = [row for row in main if _seen(row)]
    worse = [row["task"] for row in beyond if _is_worse(row)]
    better = [row["task"] for row in beyond if not _is_worse(row)]
    counted = f"{_listed(worse)} lower, {_listed(better)} higher, of {len(main)} benchmark{'s' * (len(main) != 1)}"
    mean = found["mean"]
    if mean is None:
        return f"{name(key)}: {counted}; no mean change, because {found.get('no_mean') or NO_MEAN}."
    if not excludes(mean, 0.0):
        return f"{name(key)}: no change of the benchmarks' mean seen, {interval(mean)}; {counted}."
    verb = "raised" if mean["value"] > 0 else "lowered"
    return f"{name(key)} {verb} the mean of the benchmarks by {interval(mean)}; {counted}."


def _listed(tasks: list[str]) -> str:
    return f"{len(tasks)} ({', '.join(tasks[:5])})" if tasks else "none"


def _seen(row: Mapping[str, Any]) -> bool:
    """Whether the change is known to be for better or for worse."""
    return row["higher_is_better"] is not None and row["change"]["low"] is not None and excludes(row["change"], 0.0)


def _is_worse(row: Mapping[str, Any]) -> bool:
    return bool((row["change"]["value"] < 0) == row["higher_is_better"])


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    change = row["change"]
    verdict = ("worse" if _is_worse(row) else "better") if _seen(row) else ""
    shown = f"{change['value']:+.3f} (no interval)" if change["n"] is None else interval(change)
    metric = row["metric"].removesuffix(",none")  # the harness's word for answers that are not filtered
    return {**row, "metric": metric, "shown": shown, "documents": change["n"], "verdict": verdict}
