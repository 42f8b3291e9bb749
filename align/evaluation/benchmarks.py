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
    higher_is_better: bool | None
    """None: not known."""
    documents: Mapping[str, float] | None
    """Document -> its score; None if the documents were not kept, or ``value`` is not their mean."""


@dataclass(frozen=True, slots=True)
class Suite:
    """What lm-evaluation-harness measured on one model."""

    scores: Mapping[str, Mapping[str, Score]]
    """Task or group -> metric -> score, in the harness's order."""
    groups: Mapping[str, tuple[str, ...]]
    """Group -> the tasks and groups in it, also of groups without a score."""
    made_with: Mapping[str, Any]
    """What two suites must share to be compared: ``task: version``, ``task: shots`` and the like."""
    documents: Mapping[str, Mapping[str, str]]
    """Task -> document -> hash of its content."""

    def inside(self) -> dict[str, str]:
        """Task or group -> the nearest group with a score that it belongs to; those in none are left out."""
        above = {inner: group for group, names in self.groups.items() for inner in names}
        found = {}
        for name in self.scores:
            group, seen = above.get(name), {name}
            while group is not None and group not in self.scores and group not in seen:
                seen.add(group)
                group = above.get(group)
            if group is not None and group in self.scores and group != name:
                found[name] = group
        return found

    def top(self) -> list[str]:
        """The tasks and groups that are in no other group with a score."""
        inside = self.inside()
        return [name for name in self.scores if name not in inside]


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
        over the tasks and groups that are in no other group, or None, and ``no_mean`` says why. ``tasks``: how many.

    Raises:
        DataError: the two suites did not answer the same documents in the same way.
    """
    _check_same(before, after, names)
    inside = before.inside()
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
    reason = _no_mean(before, after)
    mean = None if reason else _mean_change(before, after)
    return {"rows": rows, "mean": mean, "no_mean": reason, "tasks": len(before.top())}


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


def _main_scores(before: Suite, after: Suite) -> Iterator[tuple[str, Score, Score]]:
    """Each task or group in no other group, with its main metric before and after."""
    for task in before.top():
        metric = main_metric(before.scores[task])
        yield f"{metric} of {task}", before.scores[task][metric], after.scores[task][metric]


def _no_mean(before: Suite, after: Suite) -> str | None:
    """Why the changes of the main metrics have no mean; None if they have one."""
    several = len(before.top()) > 1
    for name, old, new in _main_scores(before, after):
        if old.documents is None or new.documents is None:
            return f"{name} is no mean over documents, or its documents were not kept"
        if old.higher_is_better is None:
            return f"the results do not say whether a higher {name} is better"
        values = [*old.documents.values(), *new.documents.values()]
        if several and not (min(values) >= 0 and max(values) <= 1):
            return f"{name} is not on the scale of 0 to 1 of the others"
    return None


def _mean_change(before: Suite, after: Suite) -> dict[str, Any]:
    """Mean over tasks of the change of their main metric; documents of different tasks are independent.

    A document of task t with n_t documents has the influence (d - mean_t) * N / (T n_t) on the mean of T tasks, where N
    is the number of all documents.
    """
    found = []
    for _, old, new in _main_scores(before, after):
        differences = _differences(old, new)
        assert differences is not None
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
        else:
            yield from (f"{task} has other documents of {key}" for key in old if _other_documents(old[key], new[key]))
    for key in dict.fromkeys([*before.made_with, *after.made_with]):
        old_value, new_value = before.made_with.get(key), after.made_with.get(key)
        if old_value != new_value:
            yield f"{key}: found {old_value!r} and {new_value!r}"
    for task in before.documents.keys() & after.documents.keys():
        if before.documents[task] != after.documents[task]:
            yield f"{task} has other documents"


def _other_documents(old: Score, new: Score) -> bool:
    return old.documents is not None and new.documents is not None and old.documents.keys() != new.documents.keys()
