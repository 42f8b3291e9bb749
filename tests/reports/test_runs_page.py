"""One page of several runs: what may stand in one table, what differs, bad input."""

import copy
from pathlib import Path
from typing import Any

import pytest

from align.commands.report import render_runs
from align.errors import ConfigError, DataError
from align.io.files import write_json
from align.reports.runs_page import differences, render_runs_page
from tests.reports.test_report import report

BAD = "<script>alert(1)</script>"


def of_run(**changes: Any) -> dict[str, Any]:
    """A report with a whole configuration; ``changes`` are dotted keys with ``__`` for the dot."""
    found = copy.deepcopy(report())
    found["run"] |= {
        "config": {
            "name": "one",
            "train": {"model": "base", "trainer": {"learning_rate": 1e-4}},
            "evaluate": {"prompts": "held.jsonl", "max_new_tokens": 24, "temperature": 1.0},
        },
        "seconds_per_stage": {"train-madpo": 12.0},
    }
    found["evaluation"] |= {"judge": "vader", "n_prompts": 200}
    for key, value in changes.items():
        *path, last = key.split("__")
        target = found
        for part in path:
            target = target[part]
        target[last] = value
    return found


def tables(page: str) -> int:
    return page.count("<th>gain / ")


def test_runs_that_were_judged_alike_share_a_table_and_others_do_not() -> None:
    same = render_runs_page({"one": of_run(), "two": of_run(run__config__train__trainer__learning_rate=2e-4)})
    assert tables(same) == 1 and same.count("<td>reference</td>") == 1
    for change in (
        {"evaluation__judge": "./rm"},
        {"run__config__evaluate__max_new_tokens": 25},
        {"run__config__evaluate__prompts": "other.jsonl"},
        {"run__config__train__model": "another"},
        {"run__config__evaluate__stop": ["\n"]},
        {"run__config__evaluate__system_prompt": "be kind"},
        {"run__config__evaluate__chat_template_kwargs": {"enable_thinking": False}},
        {"run__config__evaluate__judge": [{"name": "vader", "max_length": 64}]},
        {"evaluation__made_from": {"prompts": "other texts of the same path", "judge": None}},
        {"evaluation__made_from": {"prompts": None, "judge": "trained again"}},
    ):
        apart = render_runs_page({"one": of_run(), "two": of_run(**change)})
        assert tables(apart) == 2 and apart.count("<td>reference</td>") == 2


def test_keys_that_an_older_version_did_not_know_have_their_defaults() -> None:
    new = {"min_p": 0.0, "top_k": 0, "engine": "vllm", "judge": [{"name": "vader", "dtype": "float32", "truth": True}]}
    changes = {f"run__config__evaluate__{key}": value for key, value in new.items()}
    old = of_run(run__config__evaluate__judge="vader")
    assert tables(render_runs_page({"one": old, "two": of_run(**changes)})) == 1


def test_keys_that_differ() -> None:
    one, two = of_run()["run"]["config"], of_run(run__config__train__trainer__learning_rate=2e-4)["run"]["config"]
    two["name"], two["filter"] = "two", {"keep": 0.5}
    assert differences({"a": one, "b": two}) == [
        {"key": "filter.keep", "values": {"a": "not set", "b": 0.5}},
        {"key": "train.trainer.learning_rate", "values": {"a": 1e-4, "b": 2e-4}},
    ]
    assert differences({"a": one, "b": one | {"name": "other"}}) == []


def test_texts_are_escaped() -> None:
    page = render_runs_page({BAD: of_run(evaluation__judge=BAD, run__config__train__model=BAD, run__command=BAD)})
    assert "<script" not in page and "&lt;script" in page and "http://" not in page


def test_runs_without_an_evaluation_are_named() -> None:
    found = of_run()
    del found["evaluation"]
    assert "<p>two</p>" in render_runs_page({"one": of_run(), "two": found})


def test_bad_input_leaves_the_page_alone(tmp_path: Path) -> None:
    for run in ("a/one", "b/one", "broken"):
        (tmp_path / run).mkdir(parents=True)
    write_json(tmp_path / "a" / "one" / "report.json", of_run())
    write_json(tmp_path / "b" / "one" / "report.json", of_run())
    write_json(tmp_path / "broken" / "report.json", {"run": 3})
    page = tmp_path / "runs.html"
    a, b = tmp_path / "a" / "one", tmp_path / "b" / "one"
    render_runs([a, b], page)
    before = page.read_text()
    assert str(a) in before and str(b) in before  # both are called one
    for runs, target, error, said in (
        ([a, b], None, ConfigError, "--output: found nothing"),
        ([a, b], tmp_path, ConfigError, "found the folder"),
        ([a, a], page, ConfigError, "twice"),
        ([a, tmp_path / "broken"], page, DataError, "not a report"),
        ([a, tmp_path / "nothing"], page, DataError, "holds no report.json"),
    ):
        with pytest.raises(error, match=said):
            render_runs(runs, target)
    assert page.read_text() == before
