"""Checked pairs through the stages of a run: trained on, never held out or filtered, their share kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from align.cli.main import app
from align.config import RunConfig, load_config
from align.data.checked_pairs import checked_rows, checked_share
from align.data.pairs import read_pairs
from align.errors import AlignError
from align.io.files import read_json
from align.run import pipeline
from align.run.stages import policy as stages
from tests.helpers.builders import bert_reward, causal, rows
from tests.helpers.command_line import jsonl
from tests.helpers.small_runs import SMALL

PLAIN = [{key: value for key, value in row.items() if key != "margin"} for row in rows(24)]


def checked_table() -> list[dict[str, Any]]:
    """Two training pairs, one turned around, and four other pairs."""
    turned = {**PLAIN[1], "chosen": PLAIN[1]["rejected"], "rejected": PLAIN[1]["chosen"]}
    fresh = [{**row, "id": f"c{k}", "prompt": f"fresh {row['prompt']}"} for k, row in enumerate(PLAIN[:4])]
    return [PLAIN[0], turned, *fresh]


def run_of(folder: Path, **more: Any) -> dict[str, Any]:
    """A run in ``folder`` with checked pairs."""
    jsonl(folder / "pairs.jsonl", PLAIN)
    jsonl(folder / "checked.jsonl", checked_table())
    checked = {"path": str(folder / "checked.jsonl"), "share": 0.4}
    return {
        "name": "r", "output_dir": str(folder / "runs"),
        "pairs": {"path": str(folder / "pairs.jsonl"), "checked": checked},
        "train": {"model": str(folder / "policy"), "methods": {"dpo": {"loss": "dpo"}}},
    } | more  # fmt: skip


def test_checked_pairs_stay_through_reward_model_split_and_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal(tmp_path / "policy")
    backbone = str(bert_reward(tmp_path / "backbone"))
    reward = {
        "model": backbone, "folds": 2, "max_length": 64, "head": "logistic", "covariates": ["length"],
        "eval_fraction": 0.2,
    }  # fmt: skip
    tree = run_of(
        tmp_path, reward=reward, filter={"keep": 0.5, "embedding_model": backbone, "skip": ["near_duplicate"]}
    )  # fmt: skip
    tree["train"] |= {"eval_pairs": {"share": 0.2}, "trainer": SMALL | {"max_steps": 1}}
    config = RunConfig.model_validate(tree)
    pipeline.run_pipeline(config, command="", until=("filter",))
    root = config.folder
    trained, held = read_pairs(root / "pairs" / "train"), read_pairs(root / "pairs" / "heldout")
    assert checked_share(trained) == pytest.approx(0.4)
    assert checked_rows(trained).sum() >= 4
    assert not set(held["id"]) & {"p0", "p1", "c0", "c1", "c2", "c3"}
    by_id = dict(zip(trained["id"], trained["chosen"], strict=True))
    assert by_id["p1"] == PLAIN[1]["rejected"]
    measured = read_pairs(root / "heldout" / "eval")
    assert not checked_rows(measured).any()
    kept = {row["id"] for row in read_json_lines(root / "filter")}
    assert kept and not kept & {"p0", "p1", "c0", "c1", "c2", "c3"}
    seen: list[Any] = []
    monkeypatch.setattr(stages, "train_policy", lambda pairs, *_, **__: seen.append(pairs))
    stages.stage_train(config, tmp_path / "out", "dpo")
    assert checked_share(seen[0]) == pytest.approx(0.4)
    assert set(seen[0]["id"]) == kept | set(trained.select(np.flatnonzero(checked_rows(trained)))["id"])
    assert np.isfinite(seen[0]["margin"]).all()


def read_json_lines(folder: Path) -> list[dict[str, Any]]:
    """The pairs that a filter kept."""
    from align.config import PairsSection
    from align.data.pairs import load_pairs
    from align.filtering.tables import KEPT

    return load_pairs(PairsSection(path=str(folder / KEPT))).to_list()


def test_a_change_of_the_checked_pairs_makes_the_stage_again(tmp_path: Path) -> None:
    causal(tmp_path / "policy")
    config = RunConfig.model_validate(run_of(tmp_path))
    pipeline.run_pipeline(config, command="", until=("pairs",))
    first = read_pairs(config.folder / "pairs" / "train")
    assert first["weight"][:-6] == [1.0] * 22
    jsonl(tmp_path / "checked.jsonl", checked_table()[2:])
    pipeline.run_pipeline(config, command="", until=("pairs",))
    again = read_pairs(config.folder / "pairs" / "train")
    assert len(again) == 28 and checked_rows(again).sum() == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": {"path": "pairs.jsonl", "checked": {"path": "checked.jsonl", "share": 1.0}}}, "less than 1"),
        ({"pairs": {"path": "pairs.jsonl", "checked": {"path": "checked.jsonl", "share": 0}}}, "greater than 0"),
        ({"pairs": {"path": "pairs.jsonl", "checked": {"path": "checked.jsonl", "shares": 0.1}}}, "shares"),
        ({"pairs": {"path": "pairs.jsonl", "checked": {"path": "no.jsonl"}}}, r"\[data-missing\] no.jsonl"),
        ({"pairs": {"path": "pairs.jsonl", "checked": {"path": "columns.jsonl"}}}, r"\[data-column\] columns.jsonl"),
        ({"pairs": {"path": "pairs.jsonl", "checked": {"path": "pairs.jsonl"}}}, "all 24 training pairs are checked"),
        ({"eval_pairs": {"path": "checked.jsonl"}}, r"\[eval-overlap\]"),
        ({"eval_pairs": {"path": "x.jsonl", "checked": {"path": "checked.jsonl"}}}, "eval_pairs.checked: checked"),
    ],
)  # fmt: skip
def test_a_dry_run_names_what_cannot_be(
    change: dict[str, Any], message: str, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = run_of(tmp_path) | {key: value for key, value in change.items() if key != "eval_pairs"}
    jsonl(tmp_path / "columns.jsonl", [{"question": "a", "good": "b"}])
    tree["train"] = {**tree["train"], "model": str(tiny_policy)}
    tree["train"] |= {"eval_pairs": change["eval_pairs"]} if "eval_pairs" in change else {}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(AlignError, match=message):
        pipeline.check(load_config(tmp_path / "run.yaml"), tables=True)
    assert not (tmp_path / "runs").exists()


def test_the_commands_judge_sources_and_choose_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sources of which one is small, and a file of pairs to check without those that are checked."""
    causal(tmp_path / "policy")
    table = [{**row, "source": "web" if k < 20 else "few"} for k, row in enumerate(PLAIN)]
    jsonl(tmp_path / "pairs.jsonl", table)
    jsonl(tmp_path / "checked.jsonl", checked_table())
    monkeypatch.chdir(tmp_path)
    options = ["--checked", "checked.jsonl", "--output"]
    judged = CliRunner().invoke(app, ["data", "sources", "pairs.jsonl", "--model", "policy", *options, "out"])
    assert judged.exit_code == 0, judged.output
    printed = " ".join(capsys.readouterr().out.split()) + " ".join(judged.output.split())
    assert "too few pairs for a verdict (fewer than 30, or no others): few, web" in printed
    assert "pairs.checked.share: 0.214 (the default)" in printed
    found = read_json(tmp_path / "out" / "sources.json")
    verdicts = [(one["source"], one["pairs"], one["named"]) for one in found["sources"]]
    assert verdicts == [("few", 4, False), ("web", 18, False)]
    command = ["data", "next-to-check", "pairs.jsonl", *options, "next.jsonl", "-n", "6"]
    assert CliRunner().invoke(app, command).exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "next.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and not {line["id"] for line in lines} & {"p0", "p1"}
    assert sorted(line["source"] for line in lines) == ["few", *["web"] * 5]
    for extra, message in (
        (["--order", "margin"], "[data-column] pairs.jsonl: found no margins"),
        (["--order", "best"], "[config-option] --order best: expected one of random, margin"),
        (["--by", "annotator"], "[data-column] pairs.jsonl: found the columns"),
    ):
        refused = CliRunner().invoke(app, [*command, *extra])
        assert isinstance(refused.exception, AlignError) and message in str(refused.exception)
