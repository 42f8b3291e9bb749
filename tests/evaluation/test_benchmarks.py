"""Benchmarks before and after: results of lm-evaluation-harness are read, paired by document, and compared."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

from align.errors import DataError
from align.evaluation.benchmarks import compare_suites
from align.evaluation.harness_results import read_suite
from align.reports.benchmark_tables import benchmark_sentences
from align.reports.comparison_page import render_comparison_page
from align.stats import mean_interval

NAMES = ("before", "after")


def results(values: dict[str, dict[str, float]], **more: Any) -> dict[str, Any]:
    """A results file as lm_eval 0.4.13 writes it, for tasks without group."""
    return {
        "results": {task: {"name": task, "alias": task, **metrics} for task, metrics in values.items()},
        "group_subtasks": {},
        "versions": dict.fromkeys(values, 1.0),
        "n-shot": dict.fromkeys(values, 0),
        "higher_is_better": {task: {"acc": True, "acc_norm": True, "perplexity": False} for task in values},
        "config": {"model": "hf", "limit": None, "gen_kwargs": {}, "fewshot_seed": 1234},
        "chat_template": None,
    } | more


def write(folder: Path, found: dict[str, Any], samples: dict[str, list[dict[str, Any]]], suffix: str = "_2026") -> Path:
    """Write the results file and its files of samples."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"results{suffix}.json").write_text(json.dumps(found))
    for task, rows in samples.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"samples_{task}{suffix}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def rows(**metrics: list[float]) -> list[dict[str, Any]]:
    """Lines of samples with these values of each metric, whose documents hold a line separator."""
    count = len(next(iter(metrics.values())))
    return [
        {"doc_id": k, "doc": {"q": f"a\u2028{k}"}, "doc_hash": f"h{k}", "filter": "none", "metrics": list(metrics)}
        | {name: values[k] for name, values in metrics.items()}
        for k in range(count)
    ]


def suite(folder: Path, **tasks: list[float]) -> Path:
    """Results of tasks whose only metric is acc, with these values of the documents."""
    found = results(
        {task: {"acc,none": float(np.mean(values)), "acc_stderr,none": 0.1} for task, values in tasks.items()}
    )
    return write(folder, found, {task: rows(acc=values) for task, values in tasks.items()})


def test_change_is_paired_by_document(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    before = generator.integers(0, 2, 60).astype(float)
    after = np.where(generator.random(60) < 0.2, 1 - before, before)
    old, new = (read_suite(suite(tmp_path / name, quiz=list(v))) for name, v in (("a", before), ("b", after)))
    (row,) = compare_suites(old, new, names=NAMES)["rows"]
    expected = mean_interval(after - before).to_dict()
    assert row["change"] == pytest.approx(expected)
    assert (row["before"], row["after"]) == (before.mean(), after.mean())
    apart = 2 * 1.96 * np.sqrt(before.var() / 60 + after.var() / 60)
    assert row["change"]["high"] - row["change"]["low"] < apart


def test_documents_are_matched_by_id_not_by_line(tmp_path: Path) -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    old = read_suite(suite(tmp_path / "a", quiz=values))
    shuffled = list(reversed(rows(acc=values)))
    new = read_suite(write(tmp_path / "b", results({"quiz": {"acc,none": float(np.mean(values))}}), {"quiz": shuffled}))
    (row,) = compare_suites(old, new, names=NAMES)["rows"]
    assert row["change"]["value"] == 0 and row["change"]["low"] is None, "every document is as before"


def test_mean_over_tasks_weighs_tasks_not_documents(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    first, second = generator.uniform(0, 1, 200), generator.integers(0, 2, 50).astype(float)
    old = read_suite(suite(tmp_path / "a", big=[0.0] * 200, small=[0.0] * 50))
    new = read_suite(suite(tmp_path / "b", big=list(first), small=list(second)))
    mean = compare_suites(old, new, names=NAMES)["mean"]
    assert mean["value"] == pytest.approx((first.mean() + second.mean()) / 2)
    error = np.sqrt(first.var(ddof=1) / 200 + second.var(ddof=1) / 50) / 2
    assert mean["high"] - mean["low"] == pytest.approx(2 * student.ppf(0.975, 249) * error, rel=0.03)


def test_lower_is_better_turns_the_sign_of_the_mean(tmp_path: Path) -> None:
    values = [list(np.linspace(1, 2, 30)), list(np.linspace(1, 2, 30) + np.tile([0.1, 0.3], 15))]
    found = [
        results({"text": {"perplexity,none": float(np.mean(one))}}, higher_is_better={"text": {"perplexity": False}})
        for one in values
    ]
    old, new = (read_suite(write(tmp_path / str(k), found[k], {"text": rows(perplexity=values[k])})) for k in range(2))
    compared = compare_suites(old, new, names=NAMES)
    assert compared["rows"][0]["change"]["value"] == pytest.approx(0.2)
    assert compared["mean"]["value"] == pytest.approx(-0.2)
    (sentence,) = benchmark_sentences({"policies": {"madpo": compared}})
    assert "lowered" in sentence and "1 (text) lower" in sentence


def test_group_has_the_interval_of_its_documents_only_if_it_is_their_mean(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    left, right = generator.integers(0, 2, 40).astype(float), generator.integers(0, 2, 10).astype(float)

    def written(name: str, group: float, shift: float) -> Path:
        found = results({"one": {"acc,none": float(left.mean())}, "two": {"acc,none": float((right * shift).mean())}})
        found["results"]["suite"] = {"acc,none": group, "alias": "suite"}
        found["group_subtasks"] = {"suite": ["one", "two"], "one": [], "two": []}
        return write(tmp_path / name, found, {"one": rows(acc=list(left)), "two": rows(acc=list(right * shift))})

    by_size = [float(np.concatenate([left, right * shift]).mean()) for shift in (1, 0)]
    old, new = (read_suite(written(f"w{k}", by_size[k], (1, 0)[k])) for k in range(2))
    compared = compare_suites(old, new, names=NAMES)
    group = next(row for row in compared["rows"] if row["task"] == "suite")
    assert group["change"]["n"] == 50 and compared["tasks"] == 1
    assert [row["inside"] for row in compared["rows"]] == ["suite", "suite", None]
    assert group["change"]["value"] == pytest.approx(by_size[1] - by_size[0])
    by_task = [float((left.mean() + (right * shift).mean()) / 2) for shift in (1, 0)]
    old, new = (read_suite(written(f"t{k}", by_task[k], (1, 0)[k])) for k in range(2))
    compared = compare_suites(old, new, names=NAMES)
    group = next(row for row in compared["rows"] if row["task"] == "suite")
    assert group["change"]["low"] is None and group["change"]["n"] is None and compared["mean"] is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found["versions"].update(quiz=2.0), "version of quiz: found 1.0 and 2.0"),
        (lambda found: found["n-shot"].update(quiz=5), "shots of quiz: found 0 and 5"),
        (lambda found: found["config"].update(limit=4.0), "limit: found None and 4.0"),
        (lambda found: found.update(chat_template="{{ x }}"), "chat template: found False and True"),
        (lambda found: found["results"].update(other={"acc,none": 0.5}), "other is in one of them only"),
        (lambda found: found["results"]["quiz"].update({"f1,none": 0.5}), "quiz has the metrics"),
    ],
)
def test_suites_measured_in_other_ways_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    values = [0.0, 1.0] * 6
    found = results({"quiz": {"acc,none": 0.5}})
    other = copy.deepcopy(found)
    change(other)
    old, new = (
        read_suite(write(tmp_path / name, one, {"quiz": rows(acc=values)}))
        for name, one in (("a", found), ("b", other))
    )
    with pytest.raises(DataError, match="not measured in the same way") as caught:
        compare_suites(old, new, names=NAMES)
    assert said in str(caught.value)


def test_other_documents_are_refused(tmp_path: Path) -> None:
    changed = rows(acc=[0.0, 1.0] * 6)
    changed[3]["doc_hash"] = "another"
    old = read_suite(suite(tmp_path / "a", quiz=[0.0, 1.0] * 6))
    new = read_suite(write(tmp_path / "b", results({"quiz": {"acc,none": 0.5}}), {"quiz": changed}))
    with pytest.raises(DataError, match="quiz has other documents"):
        compare_suites(old, new, names=NAMES)


def test_without_samples_there_is_no_interval(tmp_path: Path) -> None:
    old = read_suite(write(tmp_path / "a", results({"quiz": {"acc,none": 0.5}}), {}))
    new = read_suite(write(tmp_path / "b", results({"quiz": {"acc,none": 0.75}}), {}))
    compared = compare_suites(old, new, names=NAMES)
    assert compared["rows"][0]["change"]["value"] == 0.25
    assert compared["rows"][0]["change"]["low"] is None and compared["mean"] is None
    page = render_comparison_page({"benchmarks": {"policies": {"p": compared}, "run": RUN}})
    assert "+0.250 (no interval)" in page


RUN = {"command": "align eval benchmarks", "policies": {"reference": "r", "p": "m"}, "seconds": 1.0}


def test_page_shows_changes_and_escapes_names(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    old = read_suite(write(tmp_path / "a", results({hostile: {"acc,none": 0.0}}), {}))
    new = read_suite(write(tmp_path / "b", results({hostile: {"acc,none": 0.0}}), {}))
    compared = compare_suites(old, new, names=NAMES)
    page = render_comparison_page({"benchmarks": {"policies": {"p": compared}, "run": RUN}})
    assert hostile not in page and "&lt;img src=x" in page
    assert "run `align eval benchmarks`" in render_comparison_page({})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "no results of lm_eval"),
        ("{", "no results of lm_eval"),
        ('{"results": {}}', "found no metric"),
        ('{"results": {"quiz": {"alias": "quiz"}}}', "found no metric"),
        ('{"results": {"quiz": {"acc,none": NaN}}}', "quiz has acc,none = nan"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "results_x.json"
    file.write_text(text)
    with pytest.raises(DataError) as caught:
        read_suite(file)
    assert said in str(caught.value) and str(file) in str(caught.value)


def test_folder_with_several_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found 0 results files"):
        read_suite(tmp_path)
    write(tmp_path, results({"quiz": {"acc,none": 0.5}}), {}, "_1")
    write(tmp_path, results({"quiz": {"acc,none": 0.5}}), {}, "_2")
    with pytest.raises(DataError, match=r"found 2 results files: results_1.json, results_2.json"):
        read_suite(tmp_path)
