"""The policy study on a tiny model: its pairs, its choice, its table, and resuming."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from align.data.pairs import read_pairs
from align.errors import DataError
from align.evaluation.policies import Policy
from align.generation.types import Sampling
from align.io.files import read_json
from reward_models.judges import make_judge
from scripts.reproduce import policy as reproduce_policy
from scripts.reproduce.crossed_effects import crossed_p
from scripts.reproduce.policy_protocol.cells import CANDIDATES, choose, relabelled, setting_name
from scripts.reproduce.policy_protocol.data import label, permuted_scores, read_known
from scripts.reproduce.policy_protocol.judging import judge_policy
from scripts.reproduce.policy_protocol.report import ERROR_RATE, holm, markdown, primary, primary_markdown, summarize
from scripts.tables import END, insert
from tests.helpers.builders import bert_reward, causal
from tests.helpers.snippets import snippets


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("protocol")
    small = {"max_steps": 3, "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False}
    config = {
        "name": "tiny",
        "reward": {"model": str(bert_reward(folder / "backbone")), "folds": 2, "trainer": small, "max_length": 64,
                   "pairs": {"path": "unused.jsonl"}},
        "sample": {"prompts": "unused.jsonl", "max_new_tokens": 6},
        "train": {"model": str(causal(folder / "policy")), "methods": {"dpo": {"loss": "dpo"}},
                  "peft": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
                  "trainer": small | {"learning_rate": 0.05}},
        "evaluate": {"prompts": "unused.jsonl", "max_new_tokens": 6, "judge": "vader"},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    sizes = {"reward-pairs": 12, "train-prompts": 16, "validation-prompts": 8, "test-prompts": 10, "seeds": 0}
    options = [item for name, value in sizes.items() for item in (f"--{name}", str(value))]
    paths = ["--config", str(folder / "run.yaml"), "--snippets", str(snippets(folder / "snippets"))]
    paths += ["--output", str(folder / "out")]
    return [*paths, *options, "--temperatures", "1", "0.5", "--qualities", "medium"]


def study(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce_policy", *options])
    reproduce_policy.main()


def test_a_complete_tiny_study(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Every cell is on disk; a rerun computes nothing; one lost cell is computed again with the same result."""
    options = [*command, "--methods", "dpo", "madpo", "relabelled"]
    study(monkeypatch, options)
    table = capsys.readouterr().out
    assert table.count("| medium |") == 3
    output = Path(command[command.index("--output") + 1])
    root = output / "outside"
    cells = {file: file.read_bytes() for file in output.rglob("cell.json")}
    assert len(cells) == 3 * 3 + 3 + 1
    assert not list(output.rglob("merged"))
    assert {file.parents[1].name for file in root.rglob("cell.json")} == {"madpo", "relabelled"}
    assert (root / "frontier.svg").exists()
    written = read_json(root / "table.json")
    assert markdown(written["rows"]) == table.strip() and written["primary"] == []
    chosen = setting_name(written["chosen"]["medium, madpo"])
    tried = {
        setting_name(one): np.mean(read_json(root / "seed-1000/medium/madpo" / setting_name(one) / "cell.json")
                                   ["decoded"]["1"]["reward"])
        for one in CANDIDATES["madpo"]
    }  # fmt: skip
    assert tried[chosen] == max(tried.values())
    lost = root / "seed-0/medium/madpo" / chosen
    lost.rename(root / "elsewhere")
    stamps = {file: file.stat().st_mtime_ns for file in cells if file.exists()}
    study(monkeypatch, options)
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert (lost / "cell.json").read_bytes() == cells[lost / "cell.json"]

    capsys.readouterr()
    elsewhere = Path(command[command.index("--output") + 1]).with_name("elsewhere")
    page = elsewhere.with_name("page.md")
    page.write_text(f"before\n<!-- tables of scripts/reproduce/policy.py -->\nstale\n{END}\nafter\n")
    known = ["--known", str(root / "cells.jsonl"), "--output", str(elsewhere), "--document", str(page)]
    study(monkeypatch, [*options, *known])
    assert capsys.readouterr().out == table
    assert table.strip() in page.read_text() and "stale" not in page.read_text()
    assert not list(elsewhere.rglob("cell.json"))
    page.write_text(f"<!-- tables of scripts/reproduce/policy.py -->\nkept\n{END}\n<!-- tables of other -->\n{END}\n")
    study(monkeypatch, [*options, *known, "--mark", "other"])
    assert page.read_text().index("kept") < page.read_text().index(table.strip())


def test_pairs_of_a_quality(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """medium: the first half holds the review's own words, against the better sample; the rest holds two samples."""
    study(monkeypatch, [*command, "--methods", "madpo"])
    root = Path(command[command.index("--output") + 1])
    pairs = read_pairs(root / "outside/seed-0/medium/margins/pairs")
    own = {row["prompt"]: row["rest"] for row in read_json(root / "prompts/prompts.json")["train"]}
    gold = make_judge("vader")
    for row in pairs.to_list():
        both = [row["chosen"], row["rejected"]]
        if int(row["id"]) < 8:
            assert " ".join(own[row["prompt"]].split()[:6]) in [text.strip() for text in both]
        gap = np.subtract(*(gold.score([row["prompt"]], [text])[0] for text in both))
        assert row["gold_margin"] == pytest.approx(gap)
        assert row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"], abs=1e-5)


@pytest.mark.parametrize("margins", ["in-sample", "cross-fitted"])
def test_other_margins(command: list[str], margins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study(monkeypatch, [*command, "--methods", "madpo", "--margins", margins])
    root = Path(command[command.index("--output") + 1])
    models = list((root / margins / "seed-0/medium/margins/reward").rglob("model.safetensors"))
    assert len(models) == {"in-sample": 1, "cross-fitted": 2}[margins]


def test_noise_margins_and_measured_trust(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tuned; the loss `trust` gets what was measured on the pairs, and the cell records it."""
    options = [*command, "--train-prompts", "60", "--snippets", str(snippets(tmp_path / "more", 140))]
    study(monkeypatch, [*options, "--methods", "trust", "--margins", "noise", "--candidates", "1"])
    root = Path(command[command.index("--output") + 1]) / "noise"
    assert not (root / "seed-1000").exists()
    (file,) = (root / "seed-0/medium/trust").rglob("cell.json")
    found = read_json(root / "seed-0/medium/measured/trust.json")
    assert read_json(file)["measured"] == {
        "slope": found["slope"], "trust": found["chosen"]["trust"], "strength": found["chosen"]["strength"]
    }  # fmt: skip


@given(st.integers(0, 10**6))
def test_permuting_keeps_the_scores_and_not_their_pairs(seed: int) -> None:
    first, second = np.arange(8.0), np.arange(100.0, 108.0)
    ids = [str(k) for k in range(8)]
    columns = {"id": ids, "reward_chosen": first, "reward_rejected": second, "margin": first - second}
    found = permuted_scores(Dataset.from_dict(columns), seed)
    chosen, rejected = np.asarray(found["reward_chosen"]), np.asarray(found["reward_rejected"])
    assert found["id"] == ids and np.allclose(np.abs(chosen - rejected), 100)
    assert sorted([*chosen, *rejected]) == sorted([*first, *second])
    assert np.allclose(found["margin"], chosen - rejected)


def test_labels_follow_bradley_terry() -> None:
    gap = np.linspace(-3, 3, 4000)
    texts = [f"a{k}" for k in range(4000)], [f"b{k}" for k in range(4000)]
    pairs = label(["p"] * 4000, *texts, gap, scale=1.0, seed=3)
    first = np.array([row.startswith("a") for row in pairs["chosen"]])
    assert first.mean() == pytest.approx(0.5, abs=0.02)
    assert first[gap > 1].mean() == pytest.approx(expit(gap[gap > 1]).mean(), abs=0.03)
    assert np.allclose(np.where(first, gap, -gap), pairs["gold_margin"])


def test_relabelled_pairs_agree_with_the_reward_model() -> None:
    row = {"id": "0", "prompt": "p", "chosen": "a", "rejected": "b", "reward_chosen": 1.0, "reward_rejected": 3.0,
           "margin": -2.0, "gold_margin": 0.5}  # fmt: skip
    kept = row | {"id": "1", "reward_chosen": 4.0, "margin": 1.0}
    found = relabelled(Dataset.from_list([row, kept])).to_list()
    turned = {"chosen": "b", "rejected": "a", "reward_chosen": 3.0, "reward_rejected": 1.0}
    assert found == [row | turned | {"margin": 2.0, "gold_margin": -0.5}, kept]


def test_budgets_are_equal_and_hold_the_published_setting() -> None:
    assert {len(tried) for tried in CANDIDATES.values()} == {3}
    for method, tried in CANDIDATES.items():
        assert len({setting_name(one) for one in tried}) == 3, method
        assert tried[0]["beta"] == 0.1


def cell(method: str, seed: int, reward: list[float], kl: float) -> dict[str, Any]:
    decoded = {"reward": reward, "kl": [kl] * len(reward), "tokens": [1] * len(reward)}
    row = {"key": f"{method}-{seed}", "quality": "high", "method": method, "seed": seed, "parameters": {"beta": 0.1}}
    return {**row, "decoded": {"1": decoded}}


def test_prompts_beyond_the_window_are_left_out_and_counted(tmp_path: Path) -> None:
    """Reward, KL and tokens are those of the other prompts, each at the same place as without the long ones."""
    model = str(causal(tmp_path / "policy"))
    fits, long = ["the film is", "the plot was"], "very " * 200
    tempered = [Sampling(4, heat, seed=0, batch_size=2, engine="transformers") for heat in (1.0, 0.5)]
    asked = (Policy("own", model), Policy("reference", model))
    found = judge_policy(*asked, [fits[0], long, fits[1]], tempered, make_judge("vader"), tmp_path / "a")
    without = judge_policy(*asked, fits, tempered, make_judge("vader"), tmp_path / "b")
    for heat in ("1", "0.5"):
        left = found[heat].pop("left_out")
        assert (left["count"], left["of"]) == (1, 3) and left["prompts"][0].startswith("1: very very")
        assert {name: len(values) for name, values in found[heat].items()} == {"reward": 2, "kl": 2, "tokens": 2}
        assert "left_out" not in without[heat]
    with pytest.raises(DataError, match="none of 1 prompts was completed"):
        judge_policy(*asked, [long], tempered, make_judge("vader"), tmp_path / "c")


def test_policies_judged_on_different_prompts_are_not_compared() -> None:
    one, other = cell("dpo", 0, [1.0, 2.0], 1.0), cell("madpo", 0, [1.0, 2.0], 1.0)
    left = {"count": 1, "of": 3, "by_policy": {"m": 1}, "prompts": ["2: long"]}
    references = [cell("reference", 0, [0.0, 4.0], 0.0)]
    with pytest.raises(DataError, match=r"left out different prompts: 0 \(none\) against 1 \(2: long\)"):
        other["decoded"]["1"]["left_out"] = left
        summarize([one, other], references)
    for judged in (one, *references):
        judged["decoded"]["1"]["left_out"] = left
    assert len(summarize([one, other], references)) == 2


def test_table_is_paired_and_leaves_out_seeds_that_a_method_lacks() -> None:
    references = [cell("reference", seed, [0.0, 4.0], 0.0) for seed in (0, 1, 2)]
    cells = [cell("dpo", 0, [1.0, 5.0], 0.5), cell("dpo", 1, [1.0, 5.0], 0.5), cell("dpo", 2, [9.0, 9.0], 0.5)]
    cells += [cell("madpo", 0, [1.5, 5.5], 2.0), cell("madpo", 1, [2.5, 4.5], 2.0)]
    dpo, madpo = summarize(cells, references)
    assert dpo["seeds"] == madpo["seeds"] == 2
    assert dpo["reward"]["value"] == 3.0 and dpo["gain_per_root_kl"]["value"] == pytest.approx(1.0)
    assert madpo["over_dpo"]["value"] == 0.5 and madpo["over_dpo_by_seed"] == [0.5, 0.5]
    assert madpo["wins_over_dpo"]["value"] == 0.75
    assert madpo["gain_per_root_kl"]["value"] == pytest.approx(1.5 / 2)
    assert choose([cells[0], cells[4], cells[3]]) in (1, 2)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5, unique=True), st.floats(0, 0.6))
@settings(deadline=None)
def test_holm_against_its_definition(seeds: list[int], shift: float) -> None:
    """Step-down p of the sorted tables; an interval excludes 0 exactly if its corrected p is below the error rate."""
    tables = {str(seed): np.random.default_rng(seed).normal(shift, 1, (3, 30)) for seed in seeds}
    found, alone = holm(tables), {name: crossed_p(table) for name, table in tables.items()}
    for name, (estimate, p) in found.items():
        before = [one for one in alone if alone[one] <= alone[name]]
        slow = max(min(1.0, alone[one] * sum(alone[other] >= alone[one] for other in alone)) for one in before)
        assert p == pytest.approx(slow)
        assert (estimate.low > 0 or estimate.high < 0) == (p < ERROR_RATE)
        assert estimate.value == pytest.approx(tables[name].mean())


def of_quality(quality: str, method: str, rewards: list[list[float]], kl: float) -> list[dict[str, Any]]:
    return [cell(method, seed, reward, kl) | {"quality": quality} for seed, reward in enumerate(rewards)]


@pytest.mark.parametrize(
    ("gains", "kl", "verdict"),
    [
        ([2.0, 2.01, 2.02], 0.5, "better"),
        ([2.0, 2.01, 2.02], 50.0, "no worse"),
        ([1.0, 1.0, 1.0], 0.5, "no worse"),
        ([0.0, 0.01, 0.02], 0.5, "worse"),
        ([3.0, 1.2, 0.5], 0.5, "no difference seen"),
    ],
)
def test_verdict_of_a_primary_comparison(gains: list[float], kl: float, verdict: str) -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, (3, 20))
    base, origin = (1.0 + noise).tolist(), noise.tolist()
    other = (np.array(gains)[:, None] + np.random.default_rng(1).normal(0, 0.01, (3, 20))).tolist()
    references = of_quality("", "reference", origin, 0.0)
    cells = [one for quality in ("high", "low") for one in of_quality(quality, "dpo", base, 0.5)]
    cells += [one for quality in ("high", "low") for one in of_quality(quality, "madpo", other, kl)]
    rows = primary(summarize(cells, references), cells, references)
    assert [(row["quality"], row["verdict"], row["baseline_gains"]) for row in rows] == [
        ("high", verdict, True), ("low", verdict, True)
    ]  # fmt: skip
    assert primary_markdown(rows).count("| yes |") == 2 and verdict in primary_markdown(rows)
    alone = [one for one in cells if one["method"] == "dpo"]
    assert primary(summarize(alone, references), alone, references) == []


@pytest.mark.parametrize(
    ("table", "mark", "count"),
    [("table.json", reproduce_policy.MARK, 24), ("larger_table.json", f"{reproduce_policy.MARK}, larger", 8)],
)
def test_tables_of_the_page_are_those_of_the_kept_numbers(table: str, mark: str, count: int) -> None:
    root = Path(__file__).parents[2]
    page, found = (root / "docs" / "results.md").read_text(encoding="utf-8"), read_json(root / "studies/policy" / table)
    tables = f"{primary_markdown(found['primary'])}\n\n{markdown(found['rows'])}"
    assert insert(page, tables, mark) == page and page.count("| low | relabelled |") == 2
    assert {row["seeds"] for row in found["rows"]} == {3} and len(found["rows"]) == count
    known = read_known([root / "studies" / "policy" / "cells.jsonl"])
    cells = [known[key] for row in found["rows"] for key in row["cells"]]
    references = [known[key] for key in found["references"]]
    again = summarize(cells, references)
    assert markdown(again) == markdown(found["rows"])
    assert primary_markdown(primary(again, cells, references)) == primary_markdown(found["primary"])
