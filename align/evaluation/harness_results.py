"""Results files of lm-evaluation-harness, as scores by document."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.errors import DataError
from align.evaluation.benchmarks import CODE, Score, Suite, mean_of
from align.io.files import read_json

RESULTS_FILE = re.compile(r"results(?P<suffix>_.+)?\.json")


def read_suite(path: Path) -> Suite:
    """The scores of a results file of lm_eval, or of a folder that holds one.

    The documents come from the files of ``--log_samples`` beside it; without them the changes have no intervals.

    Raises:
        DataError: there is no such file, there are several, or it is none of lm_eval.
    """
    file = _results_file(path)
    try:
        found = read_json(file)
        results, groups = found["results"], found.get("group_subtasks") or {}
        groups = {group: tuple(inner) for group, inner in groups.items() if inner and group in results}
        matched = RESULTS_FILE.fullmatch(file.name)
        suffix = (matched["suffix"] or "") if matched else ""
        samples = {task: _samples(file.with_name(f"samples_{task}{suffix}.jsonl")) for task in results}
        scores = {task: _scores(task, found, groups, samples) for task in results}
        scores = {task: metrics for task, metrics in scores.items() if metrics}
        hashes = {
            task: {str(row["doc_id"]): str(row.get("doc_hash")) for row in rows}
            for task, rows in samples.items()
            if rows is not None
        }
        made_with = _made_with(found, scores)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{file}: no results of lm_eval ({type(error).__name__}: {error})",
            code=CODE,
            hint="give the file results_*.json that `lm_eval --output_path` wrote",
        ) from None
    if not scores:
        raise DataError(f"{file}: found no metric, expected the results of a task", code=CODE)
    return Suite(scores, {group: inner for group, inner in groups.items() if group in scores}, made_with, hashes)


def _results_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(file for file in path.rglob("results*.json") if RESULTS_FILE.fullmatch(file.name))
    if len(found) != 1:
        named = f": {', '.join(str(file.relative_to(path)) for file in found[:5])}" if found else ""
        raise DataError(
            f"{path}: found {len(found)} results files{named}, expected one results_*.json",
            code=CODE,
            hint="name the file that `lm_eval --output_path` wrote",
        )
    return found[0]


def _samples(file: Path) -> list[dict[str, Any]] | None:
    """Lines of the samples of a task; None without such a file (a group has none)."""
    if not file.exists():
        return None
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def _scores(
    task: str,
    found: Mapping[str, Any],
    groups: Mapping[str, tuple[str, ...]],
    samples: Mapping[str, list[dict[str, Any]] | None],
) -> dict[str, Score]:
    better = found.get("higher_is_better", {}).get(task, {})
    results = found["results"]
    scores = {}
    for key, value in results[task].items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise ValueError(f"{task} has {key} = {value}")
        documents: dict[str, float] | None = {}
        for leaf in (one for one in _leaves(task, groups) if key in results.get(one, {})):
            own = _values(samples.get(leaf), metric, chosen)
            documents = None if own is None or documents is None else documents | {f"{leaf}/{k}": own[k] for k in own}
        kept = None if not documents else mean_of(float(value), documents)
        scores[key] = Score(float(value), better.get(metric) is not False, kept)
    return scores


def _leaves(task: str, groups: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    if task not in groups:
        yield task
    for inner in groups.get(task, ()):
        yield from _leaves(inner, groups)


def _values(rows: list[dict[str, Any]] | None, metric: str, chosen: str) -> dict[str, float] | None:
    """Document -> value of a metric under a filter; None if a document has no number."""
    if rows is None:
        return None
    rows = [row for row in rows if row.get("filter", chosen) == chosen]
    if not rows or not all(isinstance(row.get(metric), bool | int | float) for row in rows):
        return None
    return {str(row["doc_id"]): float(row[metric]) for row in rows}


def _made_with(found: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    config = found.get("config", {})
    per_task = {
        f"{what} of {task}": found.get(key, {}).get(task)
        for what, key in (("version", "versions"), ("shots", "n-shot"))
        for task in scores
    }
    return per_task | {
        "limit": config.get("limit"),
        "gen_kwargs": config.get("gen_kwargs") or None,
        "fewshot_seed": config.get("fewshot_seed"),
        "system_instruction": found.get("system_instruction"),
        "chat template": bool(found.get("chat_template")),
    }
