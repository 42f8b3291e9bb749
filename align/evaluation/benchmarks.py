"""Benchmark scores of one model against another's, document by document (the alignment tax). Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.errors import DataError
from align.stats import influence_interval, mean_interval

PREFERRED = "acc_norm"
"""The main metric of a task that has it; otherwise its first one."""
CLOSE = 1e-6
CODE = "benchmark-results"


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task, or of a group of tasks."""

    value: float
    higher_is_better: bool
    documents: Mapping[str, float] | None
    """Document -> its score; None if the documents were not kept, or ``value`` is not their mean."""


@dataclass(frozen=True, slots=True)
class Suite:
    """What lm-evaluation-harness measured on one model."""

    scores: Mapping[str, Mapping[str, Score]]
    """Task or group -> metric -> score, in the harness's order."""
    groups: Mapping[str, tuple[str, ...]]
    """Group -> the tasks and groups in it."""
    made_with: Mapping[str, Any]
    """What two suites must share to be compared: ``task: version``, ``task: shots`` and the like."""
    documents: Mapping[str, Mapping[str, str]]
    """Task -> document -> hash of its content."""

    def top(self) -> list[str]:
        """The tasks and groups that are in no other group."""
        inner = {name for names in self.groups.values() for name in names}
        return [name for name in self.scores if name not in inner]


def mean_of(value: float, documents: Mapping[str, float]) -> Mapping[str, float] | None:
    """``documents`` if ``value`` is their mean, None otherwise (a corpus score, a group weighted in another way)."""
    mean = float(np.mean(list(documents.values()))) if documents else float("nan")
    return documents if abs(mean - value) <= CLOSE * max(1.0, abs(value)) else None


def main_metric(scores: Mapping[str, Score]) -> str:
    """The metric that stands for a task: ``acc_norm`` where it has one, otherwise the first one."""
    return next((key for key in scores if key.split(",")[0] == PREFERRED), next(iter(scores)))


def compare_suites(before: Suite, after: Suite, *, names: tuple[str, str]) -> dict[str, Any]:
    """Change of every metric from ``before`` to ``after``, with a 95% interval over documents.

    Both models answered the same documents, so the interval is that of the paired difference; it covers the choice of
    the documents, not that of the training seed. A metric that is no mean over documents has a change without interval.

    Args:
        before: the suite of the model from which the training started.
        after: the suite of the trained model.
        names: the names of the two, for messages.

    Returns:
        ``rows``: one per task or group and metric, with ``task``, ``group`` (whether it is one), ``inside`` (the group
        that it belongs to, or None), ``metric``, ``main``, ``before``, ``after``, ``change`` (an estimate),
        ``higher_is_better``. ``mean``: the mean change of the main metrics, with the sign turned where lower is better,
        over the tasks and groups that are in no other group; None if one of them has no interval. ``tasks``: how many.

    Raises:
        DataError: the two suites did not answer the same documents in the same way.
    """
    _check_same(before, after, names)
    inside = {inner: group for group, all_inner in before.groups.items() for inner in all_inner}
    rows = []
    for task, scores in before.scores.items():
        main = main_metric(scores)
        for metric, old in scores.items():
            new = after.scores[task][metric]
            rows.append(
                {
                    "task": task,
                    "group": task in before.groups,
                    "inside": inside.get(task),
                    "metric": metric,
                    "main": metric == main,
                    "before": old.value,
                    "after": new.value,
                    "change": _change(old, new),
                    "higher_is_better": old.higher_is_better,
                }
            )
    return {"rows": rows, "mean": _mean_change(before, after), "tasks": len(before.top())}


def _differences(old: Score, new: Score) -> np.ndarray | None:
    """Change of each document, [D]; None without documents."""
    if old.documents is None or new.documents is None:
        return None
    return np.array([new.documents[key] - score for key, score in old.documents.items()])


def _change(old: Score, new: Score) -> dict[str, Any]:
    differences = _differences(old, new)
    if differences is None:
        return {"value": new.value - old.value, "low": None, "high": None, "n": None, "units": None}
    return mean_interval(differences).to_dict()


def _mean_change(before: Suite, after: Suite) -> dict[str, Any] | None:
    """Mean over tasks of the change of their main metric; documents of different tasks are independent.

    A document of task t with n_t documents has the influence (d - mean_t) * N / (T n_t) on the mean of T tasks, where N
    is the number of all documents.
    """
    found = []
    for task in before.top():
        metric = main_metric(before.scores[task])
        old, new = before.scores[task][metric], after.scores[task][metric]
        differences = _differences(old, new)
        if differences is None:
            return None
        found.append(differences if old.higher_is_better else -differences)
    total = sum(one.size for one in found)
    influence = [(one - one.mean()) * total / (len(found) * one.size) for one in found]
    mean = float(np.mean([one.mean() for one in found]))
    return influence_interval(mean, np.concatenate(influence), n=total).to_dict()


def _check_same(before: Suite, after: Suite, names: tuple[str, str]) -> None:
    problems = list(_problems(before, after))
    if problems:
        raise DataError(
            f"{names[1]} and {names[0]} were not measured in the same way: {'; '.join(problems[:5])}",
            code=CODE,
            hint="run the same tasks, versions, shots and --limit for both",
        )


def _problems(before: Suite, after: Suite) -> Iterator[str]:
    for task in dict.fromkeys([*before.scores, *after.scores]):
        old, new = before.scores.get(task), after.scores.get(task)
        if old is None or new is None:
            yield f"{task} is in one of them only"
        elif old.keys() != new.keys():
            yield f"{task} has the metrics {sorted(old)} and {sorted(new)}"
    for key in dict.fromkeys([*before.made_with, *after.made_with]):
        old_value, new_value = before.made_with.get(key), after.made_with.get(key)
        if old_value != new_value:
            yield f"{key}: found {old_value!r} and {new_value!r}"
    for task in before.documents.keys() & after.documents.keys():
        if before.documents[task] != after.documents[task]:
            yield f"{task} has other documents"
