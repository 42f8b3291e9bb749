"""Judges of a run by name: several in one evaluation, a server that goes down, what cannot judge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from align.config import RunConfig, load_config
from align.config.judging import JudgeSection
from align.data.pairs import write_pairs
from align.errors import ConfigError, EnvironmentProblem, ModelError
from align.io.files import read_json
from align.run.stages import work_of
from reward_models.named_judges import check_judge
from tests.generation.test_server_engine import Fake
from tests.helpers.builders import bert_reward
from tests.reward_models.test_server_judge import by_log_probs

PROMPTS = [f"the {a} {b} is" for a in ("good", "bad", "dull") for b in ("film", "plot", "review")]
RUN = {
    "name": "r", "pairs": {"path": "pairs.jsonl"}, "train": {"model": "m", "methods": {"dpo": {"loss": "dpo"}}},
}  # fmt: skip


def evaluated(root: Path, judge: Any) -> dict[str, Any]:
    """Numbers of the stage `evaluate` with written completions, `good` by the policy and `bad` by the reference."""
    tree = {**RUN, "output_dir": str(root / "runs"), "evaluate": {"prompts": "p", "judge": judge}}
    config, out = RunConfig.model_validate(tree), root / "out"
    pairs = [{"id": str(k), "prompt": "a", "chosen": f" b {k}", "rejected": " good c"} for k in range(5)]
    table = Dataset.from_list([row | {"margin": float(k)} for k, row in enumerate(pairs)])
    write_pairs(table, config.folder / "margins" / "pairs")
    for name, word in (("reference", "bad"), ("dpo", "good")):
        texts = [f" {word}"] * 8 + [" good"]
        columns = {"prompt": PROMPTS, "text": texts, "tokens": [1] * 9, "logp_policy": [-1.0] * 9}
        columns |= {"logp_reference": [-2.0] * 9, "kl": np.linspace(0.5, 1, 9).tolist()}
        (config.folder / f"generate-{name}").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns).to_parquet(str(config.folder / f"generate-{name}" / "completions.parquet"))
    out.mkdir(exist_ok=True)
    work_of("evaluate")(config, out)
    return dict(read_json(out / "metrics.json"))


def test_several_judges_and_their_agreement(tmp_path: Path) -> None:
    reward = str(bert_reward(tmp_path / "reward"))
    fake = Fake(by_log_probs)
    with fake.running() as address:
        judges = [
            {"name": "server:policy", "base_url": address, "truth": True}, "vader",
            {"name": reward, "dtype": "bfloat16", "max_length": 32},
        ]  # fmt: skip
        found = evaluated(tmp_path, judges)
    names = ["server:policy", "vader", reward]
    assert [one["name"] for one in found["judges"]] == names and found["judge"] == "server:policy" and found["truth"]
    server, vader = found["judges"][:2]
    assert server["cost"] == {"questions": 17, "prompt_tokens": 510, "completion_tokens": 17}  # one pair is equal
    assert found["policies"]["dpo"]["reward"]["value"] == pytest.approx((8 * 0.8 + 0.5) / 9)
    assert server["win_rates"]["dpo"]["rate"]["value"] == pytest.approx((8 * 0.8 + 0.5) / 9)
    assert vader["win_rates"]["dpo"]["rate"]["value"] == pytest.approx(8.5 / 9)
    assert found["policies"]["reference"]["reward"]["value"] == 0.5 and found["judge_correlation"] is None
    assert found["policies"]["dpo"]["kl"]["value"] == pytest.approx(0.75)
    assert found["identical_texts"] == [{"a": "dpo", "b": "reference", "identical": 1, "n": 9}]
    assert len(found["agreement"]) == 3
    first = found["agreement"][0]
    assert (first["a"], first["b"], first["same_verdict"]["value"]) == ("server:policy", "vader", 1)
    assert first["kappa"]["value"] == 1


def test_a_server_that_goes_down_in_the_middle(tmp_path: Path) -> None:
    """One message; the verdicts so far and the other judges' scores are kept, and only the rest is asked for."""
    down = Fake(lambda path, body, number: by_log_probs(path, body, number) if number < 2 else (503, "down"))
    judge: dict[str, Any] = {"name": "server:policy", "concurrency": 1, "attempts": 1}
    with down.running() as address, pytest.raises(EnvironmentProblem, match="status 503: down, after 1 tries"):
        evaluated(tmp_path, ["vader", judge | {"base_url": address}])
    fake = Fake(by_log_probs)
    with fake.running() as address:
        found = evaluated(tmp_path, ["vader", judge | {"base_url": address}])
    assert found["judges"][1]["cost"]["questions"] == len(fake.bodies) + 1
    assert not (tmp_path / "out" / "parts").exists()


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (None, "missing; there is no default judge: name the folder or hub id of a reward model, yes-no:MODEL"),
        ([], "missing; there is no default judge"),
        (["vader", "vader"], "found a judge twice"),
        ("llm:", "found 'llm:' without a model"),
        ([{"name": "vader", "truth": True}, {"name": "a/b", "truth": True}], "more than one judge"),
        ({"name": "vader", "temperature": 1}, "temperature"),
        (3, "judge"),
    ],
)
def test_a_judge_has_to_be_named(judge: Any, message: str, tmp_path: Path) -> None:
    evaluate = {"prompts": "p.jsonl"} | ({} if judge is None else {"judge": judge})
    (tmp_path / "run.yaml").write_text(json.dumps({**RUN, "evaluate": evaluate}))
    with pytest.raises(ConfigError, match=r"evaluate\.judge") as error:
        load_config(tmp_path / "run.yaml")
    assert message in str(error.value)


def test_what_cannot_judge_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for given, kind, message in (
        ({"name": "vadr"}, ConfigError, "judge 'vadr' is not known (did you mean `vader`?)"),
        ({"name": "vader", "max_length": 9}, ConfigError, "found max_length, expected only options of its kind: none"),
        ({"name": "llm:a/b", "base_url": "http://x/v1"}, ConfigError, "found base_url"),
        ({"name": "server:a", "dtype": "auto"}, ConfigError, "found dtype"),
        ({"name": str(tmp_path / "empty")}, ModelError, "empty"),
        ({"name": f"yes-no:{tmp_path / 'empty'}"}, ModelError, "empty"),
    ):
        with pytest.raises(kind) as error:
            check_judge(JudgeSection.model_validate(given))
        assert message in str(error.value)
