"""Runs on thumbs from files: a policy under KTO and its implicit reward, a reward model, refusals of a dry run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from align.cli.main import app
from align.config.reading import load_section
from align.config.run import RunConfig
from align.data.pairs import read_pairs
from align.errors import AlignError, ConfigError
from align.models.loading import load_policy
from align.run.pipeline import check
from reward_models.implicit import ImplicitReward, ImplicitSource
from tests.helpers.builders import causal, llama_reward, rows, trained_adapter
from tests.helpers.command_line import jsonl
from tests.helpers.small_runs import SMALL

PAIRS = [{name: row[name] for name in ("id", "prompt", "chosen", "rejected")} for row in rows(8)]
THUMBS: list[dict[str, Any]] = [
    {"prompt": row["prompt"], "completion": row["chosen" if k % 2 else "rejected"], "label": bool(k % 2)}
    for k, row in enumerate(rows(12))
]
STEPS = {**SMALL, "max_steps": 3, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    causal(tmp_path / "policy")
    jsonl(tmp_path / "mixed.jsonl", [*THUMBS, *PAIRS[:3]])
    jsonl(tmp_path / "pairs.jsonl", PAIRS)
    return tmp_path


def write(folder: Path, **sections: Any) -> Path:
    train = {"model": "policy", "methods": {"k": {"loss": "kto", "parameters": {"beta": 0.3}}}, "trainer": STEPS}
    run = {"name": "tiny", "pairs": {"path": "mixed.jsonl"}, "train": train} | sections
    (folder / "run.yaml").write_text(yaml.safe_dump({name: value for name, value in run.items() if value}))
    return folder / "run.yaml"


def align(*arguments: str) -> str:
    found = CliRunner().invoke(app, list(arguments))
    assert found.exit_code == 0, (found.output, found.exception)
    return found.output


def brute_force(folder: str, prompt: str, response: str) -> float:
    """Log-prob of the response with its end, token by token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start, ids = (tokenizer(text)["input_ids"] for text in (prompt, prompt + response))
    whole = torch.tensor([[*ids, tokenizer.eos_token_id]])
    model = load_policy(folder, dtype="float32").eval()
    with torch.no_grad():
        logps = model(whole).logits[0, :-1].log_softmax(dim=-1)
    return float(sum(logps[k - 1, whole[0, k]] for k in range(len(start), whole.shape[1])))


def test_a_run_on_thumbs_and_pairs_and_the_implicit_reward_of_its_policy(folder: Path) -> None:
    align("run", str(write(folder)), "--dry-run")
    align("run", str(write(folder)))
    root = folder / "runs" / "tiny"
    table = read_pairs(root / "pairs" / "train")
    assert table["thumb"] == [float(row["label"]) for row in THUMBS] + [None] * 3
    history = json.loads((root / "train-k" / "history.json").read_text())["history"]
    assert len(history) and all("kl" in step for step in history)

    model = str(root / "train-k" / "model")
    source = ImplicitSource.find(model)
    assert (source.beta, Path(source.reference).name) == (0.3, "policy")
    align("reward", "score", "pairs.jsonl", "--model", model, "--implicit", "--output", "scored")
    scored = read_pairs(folder / "scored")
    for row in scored.select(range(3)):
        ratios = [
            0.3 * (brute_force(model, row["prompt"], row[side]) - brute_force("policy", row["prompt"], row[side]))
            for side in ("chosen", "rejected")
        ]
        assert [row["reward_chosen"], row["reward_rejected"]] == pytest.approx(ratios, abs=1e-4)
        assert row["margin"] == pytest.approx(ratios[0] - ratios[1], abs=1e-4)
    alone = ImplicitReward(source).score_completions(scored["prompt"], scored["rejected"])
    assert alone == pytest.approx(np.asarray(scored["reward_rejected"]), abs=1e-5) and np.abs(alone).max() > 0.01
    align("eval", "reward-model", "pairs.jsonl", "--model", model, "--implicit", "--text", "--output", "eval")
    report = json.loads((folder / "eval" / "reward_model.json").read_text())
    assert report["margins"] == pytest.approx(scored["margin"], abs=1e-5)


def test_a_reward_model_of_thumbs_and_pairs(folder: Path) -> None:
    llama_reward(folder / "rm")
    reward = {
        "model": "rm", "pairs": {"path": "mixed.jsonl"}, "eval_pairs": {"path": "pairs.jsonl"},
        "objective": {"name": "thumbs"}, "max_length": 64, "trainer": STEPS | {"max_steps": 12},
    }  # fmt: skip
    align("reward", "train", str(write(folder, pairs={"path": "pairs.jsonl"}, reward=reward, train=None)))
    found = json.loads((folder / "runs" / "tiny" / "reward" / "metrics.json").read_text())
    assert found["in_sample"]["n"] == 3 if "n" in found["in_sample"] else found["in_sample"]
    assert found["heldout"]["accuracy"]["value"] > 0.5


def test_refusals_of_a_dry_run(folder: Path) -> None:
    methods = {"methods": {"d": {"loss": "dpo"}}}
    train = {"model": "policy", "trainer": STEPS, "methods": {"k": {"loss": "kto"}}}
    reward = {"model": "rm", "pairs": {"path": "mixed.jsonl"}, "max_length": 64, "trainer": STEPS}
    llama_reward(folder / "rm")
    jsonl(folder / "odd.jsonl", [*THUMBS, {"prompt": "p", "completion": "c", "label": "up"}])
    jsonl(folder / "both.jsonl", [*THUMBS, THUMBS[0] | {"chosen": "c", "rejected": "d"}])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"train": train | methods}, "for the loss dpo of train.methods.d: found 12 single responses"),
        ({"filter": {"keep": 0.5}}, "pairs, for filter: found 12 single"),
        ({"train": train | {"eval_pairs": {"path": "pairs.jsonl"}}}, "train.eval_pairs: found it under the loss kto"),
        ({"pairs": {"path": "odd.jsonl"}}, "row 13:label: found 'up', expected true"),
        ({"pairs": {"path": "both.jsonl"}}, "row 13:label: found"),
        ({"pairs": {"path": "pairs.jsonl"}, "reward": reward}, "reward.objective bradley_terry: found 12 single"),
        ({"pairs": {"path": "pairs.jsonl"}, "reward": reward | {"objective": {"name": "thumbs"}}}, "eval_pairs"),
        ({"reward": reward | {"pairs": {"path": "pairs.jsonl"}}}, "reward.pairs"),
    ]
    for sections, said in cases:
        config = load_section(write(folder, **sections), [], RunConfig)
        with pytest.raises(AlignError) as caught:
            check(config, tables=True)
        assert said in str(caught.value), (said, str(caught.value))


def test_what_of_an_implicit_reward_is_not_found_is_refused(folder: Path) -> None:
    adapter = str(trained_adapter(folder / "policy", folder / "adapter", 3))
    with pytest.raises(ConfigError, match="found no reference in the folder of a run"):
        ImplicitSource.find("policy", beta=0.1)
    with pytest.raises(ConfigError, match="found no beta in the folder of a run"):
        ImplicitSource.find(adapter)
    assert Path(ImplicitSource.find(adapter, beta=0.2).reference).name == "policy"
    for beta in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="expected a number above 0"):
            ImplicitSource.find(adapter, beta=beta)
    found = CliRunner().invoke(app, ["reward", "score", "pairs.jsonl", "--model", "rm", "--beta", "1", "--output", "o"])
    assert found.exit_code != 0
