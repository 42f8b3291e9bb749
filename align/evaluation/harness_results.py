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

LOWER = frozenset({"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"})
HIGHER = frozenset({"acc", "acc_norm", "acc_mutual_info", "exact_match", "f1", "mcc", "bleu", "chrf"})
"""Metrics of the harness, for results of versions that do not say which way is better."""
NO_METRIC = "bypass"
"""What ``--predict_only`` writes in place of metrics."""
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
        results = found["results"]
        groups = {group: tuple(inner) for group, inner in (found.get("group_subtasks") or {}).items() if inner}
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
    return Suite(scores, groups, made_with, hashes)


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
    results = found["results"]
    scores = {}
    for key, value in results[task].items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric == NO_METRIC or metric.endswith("_stderr"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise ValueError(f"{task} has {key} = {value}")
        documents: dict[str, float] | None = {}
        leaves = list(dict.fromkeys(_leaves(task, groups)))
        for leaf in (one for one in leaves if key in results.get(one, {})):
            own = _values(samples.get(leaf), metric, chosen)
            documents = None if own is None or documents is None else documents | {f"{leaf}/{k}": own[k] for k in own}
        kept = None if not documents else mean_of(float(value), documents)
        scores[key] = Score(float(value), _higher_is_better(found, leaves, task, metric), kept)
    return scores


def _higher_is_better(found: Mapping[str, Any], leaves: list[str], task: str, metric: str) -> bool | None:
    """Which way is better: as the results say, their tasks' files, or the metric's name; None if none does."""
    stated, configs = found.get("higher_is_better") or {}, found.get("configs") or {}
    ways = [(stated.get(task) or {}).get(metric)]
    if ways == [None]:
        lists = [(configs.get(leaf) or {}).get("metric_list") or [] for leaf in leaves]
        ways = [one.get("higher_is_better") for own in lists for one in own if one.get("metric") == metric]
        ways += [(stated.get(leaf) or {}).get(metric) for leaf in leaves]
    known = {way for way in ways if isinstance(way, bool)}
    if len(known) == 1:
        return known.pop()
    return None if known or metric not in LOWER | HIGHER else metric in HIGHER


def _leaves(task: str, groups: Mapping[str, tuple[str, ...]], above: tuple[str, ...] = ()) -> Iterator[str]:
    if task in above:
        raise ValueError(f"the group {task} is in itself")
    if task not in groups:
        yield task
    for inner in groups.get(task, ()):
        yield from _leaves(inner, groups, (*above, task))


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
        for what, key in (("version", "versions"), ("shots", "n-shot"), ("documents", "n-samples"))
        for task in scores
    }
    return per_task | {
        "limit": config.get("limit"),
        "gen_kwargs": config.get("gen_kwargs") or None,
        "fewshot_seed": config.get("fewshot_seed"),
        "system_instruction": found.get("system_instruction"),
        "fewshot_as_multiturn": bool(found.get("fewshot_as_multiturn")),
        "chat template": bool(found.get("chat_template")),
    }
