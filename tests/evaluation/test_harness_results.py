"""Results of lm-evaluation-harness in shapes other than the plain one: nested groups, directions, scales, documents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.errors import DataError
from align.evaluation.benchmarks import compare_suites
from align.evaluation.harness_results import read_suite
from align.reports.benchmark_tables import benchmark_sentences, benchmark_tables
from align.reports.comparison_page import render_comparison_page
from tests.evaluation.test_benchmarks import NAMES, RUN, results, rows, write

GENERATOR = np.random.default_rng(5)
BEFORE = GENERATOR.integers(0, 2, 40).astype(float).tolist()
AFTER = [float(value or k % 3 == 0) for k, value in enumerate(BEFORE)]


def compared(
    tmp_path: Path, metric: str, values: list[list[float]], *, others: dict[str, list[float]] | None = None, **more: Any
) -> dict[str, Any]:
    """The comparison of a task ``quiz`` before and after, and of other tasks with acc that did not change."""
    suites = []
    for k, own in enumerate(values):
        metrics = {"quiz": {f"{metric},none": float(np.mean(own))}}
        metrics |= {task: {"acc,none": float(np.mean(same))} for task, same in (others or {}).items()}
        samples = {"quiz": rows(**{metric: own})} | {task: rows(acc=same) for task, same in (others or {}).items()}
        suites.append(read_suite(write(tmp_path / f"{metric}{k}", results(metrics, **more), samples)))
    return compare_suites(*suites, names=NAMES)


def test_group_without_score_hides_no_task_from_the_group_above(tmp_path: Path) -> None:
    """Outer group (scored) of an inner one (not scored) of two tasks: the outer one stands for both, once."""

    def written(name: str, values: list[float]) -> Path:
        found = results({task: {"acc,none": float(np.mean(values))} for task in ("one", "two", "outer")})
        found["results"]["inner"] = {"alias": " - inner", "name": "inner"}
        found["group_subtasks"] = {"outer": ["inner"], "inner": ["one", "two"]}
        return write(tmp_path / name, found, {"one": rows(acc=values), "two": rows(acc=values)})

    found = compare_suites(read_suite(written("a", BEFORE)), read_suite(written("b", AFTER)), names=NAMES)
    assert found["tasks"] == 1
    assert {row["task"]: row["inside"] for row in found["rows"]} == {"one": "outer", "two": "outer", "outer": None}
    assert found["rows"][2]["change"]["n"] == 80 and found["mean"]["n"] == 80


def test_group_in_itself_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, results({"quiz": {"acc,none": 0.5}}, group_subtasks={"quiz": ["b"], "b": ["quiz"]}), {})
    with pytest.raises(DataError, match="is in itself"):
        read_suite(folder)


@pytest.mark.parametrize(
    ("metric", "more", "better"),
    [
        ("brier_score", {}, False),
        ("acc", {}, True),
        ("own", {}, None),
        ("own", {"configs": {"quiz": {"metric_list": [{"metric": "own", "higher_is_better": False}]}}}, False),
        ("own", {"configs": {"quiz": {"metric_list": [{"metric": "own", "higher_is_better": True}]}}}, True),
        ("acc", {"higher_is_better": {"quiz": {"acc": None}}}, True),
    ],
)
def test_which_way_is_better_where_the_results_do_not_say(
    tmp_path: Path, metric: str, more: dict[str, Any], better: bool | None
) -> None:
    found = compared(tmp_path, metric, [BEFORE, AFTER], **{"higher_is_better": None} | more)
    assert found["rows"][0]["higher_is_better"] is better
    rise = float(np.mean(AFTER) - np.mean(BEFORE))
    section = {"policies": {"p": found}, "run": RUN}
    page = render_comparison_page({"benchmarks": section})
    if better is None:
        assert found["mean"] is None and "own,none of quiz is better" in found["no_mean"]
        assert "which way is better is not known" in page and "no mean change" in benchmark_sentences(section)[0]
        assert benchmark_tables(section)["p"][0]["verdict"] == ""
    else:
        assert found["mean"]["value"] == pytest.approx(rise if better else -rise)


def test_group_whose_tasks_disagree_has_no_direction(tmp_path: Path) -> None:
    ways = {"one": {"own": True}, "two": {"own": False}, "suite": {"own": None}}
    found = results({task: {"own,none": 0.5} for task in ways}, higher_is_better=ways)
    scores = read_suite(write(tmp_path, found | {"group_subtasks": {"suite": ["one", "two"]}}, {})).scores
    assert [scores[task]["own,none"].higher_is_better for task in ways] == [True, False, None]


def test_scales_are_not_averaged(tmp_path: Path) -> None:
    """A BLEU of 0 to 100 would drown an accuracy; alone it has its change."""
    scores = [[20 * value for value in own] for own in (BEFORE, AFTER)]
    more = {"higher_is_better": {"quiz": {"bleu_max": True}, "other": {"acc": True}}}
    found = compared(tmp_path / "two", "bleu_max", scores, others={"other": BEFORE}, **more)
    assert found["mean"] is None and found["no_mean"].startswith("bleu_max,none of quiz is not on the scale")
    assert found["no_mean"] in render_comparison_page({"benchmarks": {"policies": {"p": found}, "run": RUN}})
    assert compared(tmp_path / "one", "bleu_max", scores, **more)["mean"]["value"] == pytest.approx(
        20 * (np.mean(AFTER) - np.mean(BEFORE))
    )


def test_documents_of_one_filter_must_be_the_same(tmp_path: Path) -> None:
    """The same documents in the files, but one filter has fewer of them in one suite, with the same mean."""
    suites = []
    for name, kept in (("a", 8), ("b", 6)):
        lines = rows(acc=[0.0, 1.0] * 4)
        other = [row | {"filter": "loose"} for row in lines]
        found = results({"quiz": {"acc,none": 0.5, "acc,loose": 0.5}})
        suites.append(read_suite(write(tmp_path / name, found, {"quiz": [*lines[:kept], *other]})))
    with pytest.raises(DataError, match="quiz has other documents of acc,none"):
        compare_suites(*suites, names=NAMES)
    with pytest.raises(DataError, match="quiz has other documents of acc,none"):
        compare_suites(*reversed(suites), names=NAMES)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n-samples": {"quiz": {"original": 9, "effective": 4}}}, "documents of quiz"),
        ({"fewshot_as_multiturn": True}, "fewshot_as_multiturn: found False and True"),
    ],
)
def test_other_numbers_of_documents_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    whole = {"n-samples": {"quiz": {"original": 9, "effective": 9}}}
    suites = [
        read_suite(write(tmp_path / str(k), results({"quiz": {"acc,none": 0.5}}, **whole | more), {}))
        for k, more in enumerate(({}, change))
    ]
    with pytest.raises(DataError, match=said):
        compare_suites(*suites, names=NAMES)


def test_predictions_alone_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no metric"):
        read_suite(write(tmp_path, results({"quiz": {"bypass,none": 999}}), {"quiz": rows(bypass=[0.0] * 4)}))


def test_page_of_a_report_that_an_older_version_wrote(tmp_path: Path) -> None:
    found = compared(tmp_path, "acc", [BEFORE, AFTER]) | {"mean": None}
    del found["no_mean"]
    page = render_comparison_page({"benchmarks": {"policies": {"p": found}, "run": RUN}})
    assert "is no mean over documents, or its documents were not kept" in page
