"""Engines and decoding of the stages of a run: a server that samples pairs, vLLM's two passes, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from align.config import RunConfig
from align.data.pairs import read_pairs
from align.data.prompts import section_prompts
from align.errors import AlignError, ConfigError, EnvironmentProblem
from align.generation import engines
from align.generation.transformers_engine import TransformersEngine
from align.run.pipeline import _decoding
from align.run.stages import sampling, work_of
from align.run.stages.sampling import run_sampling
from tests.generation.test_server_engine import Fake, echo
from tests.helpers.builders import bert_reward, causal

PROMPTS = [f"the {a} {b} is" for a in ("good", "bad") for b in ("film", "plot", "review")]


def make(root: Path, part: str, **fields: Any) -> RunConfig:
    """A run of tiny models whose section ``sample`` or ``evaluate`` has these fields."""
    causal(root / "policy")
    bert_reward(root / "runs" / "r" / "reward" / "model")
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    prompts, policy = str(root / "prompts.jsonl"), str(root / "policy")
    sections: dict[str, Any] = {
        "sample": {"prompts": prompts, "num_generations": 3, "max_new_tokens": 6},
        "evaluate": {"prompts": prompts, "max_new_tokens": 6, "judge": "vader"},
    }
    sections[part] |= fields
    tree = {
        "name": "r", "output_dir": str(root / "runs"), "reward": {"model": policy, "pairs": {"path": "pairs.jsonl"}},
        "train": {"model": policy, "methods": {"dpo": {"loss": "dpo"}}},
    }  # fmt: skip
    return RunConfig.model_validate(tree | sections)


def test_a_server_samples_the_pairs_and_one_that_goes_down_loses_no_finished_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "PART", 2)
    options = {"concurrency": 1, "attempts": 1}
    (tmp_path / "out").mkdir()
    down = Fake(lambda path, body, number: echo(path, body, number) if number < 9 else (503, "down"))
    with down.running() as address:
        config = make(tmp_path, "sample", base_url=address, served_as="policy", options=options)
        with pytest.raises(EnvironmentProblem, match="status 503: down"):
            work_of("sample")(config, tmp_path / "out")
    fake = Fake(echo)
    with fake.running() as address:
        config = make(tmp_path, "sample", base_url=address, served_as="policy", options=options)
        work_of("sample")(config, tmp_path / "out")
    assert len(fake.bodies) == 3 * len(PROMPTS) - 6  # one part of two prompts was finished before
    pairs = read_pairs(tmp_path / "out" / "train")
    assert len(pairs) == len(PROMPTS)
    assert all(row["chosen"].startswith(f"{row['prompt']}/") for row in pairs)


def test_completions_of_another_engine_get_their_kl_in_a_second_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM stands in by the transformers engine: the same numbers as at once."""
    (tmp_path / "at_once").mkdir()
    (tmp_path / "after").mkdir()
    fields = {"top_k": 7, "min_p": 0.01, "temperature": 0.8, "stop": ["good"]}
    work_of("generate-reference")(make(tmp_path, "evaluate", **fields), tmp_path / "at_once")

    def stand_in(model: str, options: dict[str, Any]) -> TransformersEngine:
        assert options == {"dtype": "float16", "max_model_len": 64}
        made = engines._load_transformers(model, model, 8, {})
        assert isinstance(made, TransformersEngine)
        return made

    monkeypatch.setattr("align.generation.vllm_engine.VllmEngine", stand_in)
    vllm = {"engine": "vllm", "dtype": "float16", "options": {"max_model_len": 64}}
    work_of("generate-reference")(make(tmp_path, "evaluate", **fields, **vllm), tmp_path / "after")
    one, other = (Dataset.from_parquet(str(tmp_path / name / "completions.parquet")) for name in ("at_once", "after"))
    assert one["text"][:] == other["text"][:] and not any("good" in text for text in one["text"])
    for column in ("kl", "logp_policy", "logp_reference"):
        assert np.allclose(one[column], other[column], atol=1e-5)
    assert min(one["kl"]) > 0


def test_what_an_engine_does_not_take(tmp_path: Path) -> None:
    for part, fields, message in (
        ("sample", {"options": {"a": 1}}, "engine transformers: found options"),
        ("sample", {"base_url": "http://x/v1", "dtype": "auto"}, "engine server: found dtype"),
        ("sample", {"served_as": "x"}, "engine transformers: found served_as"),
        ("sample", {"engine": "vllm", "base_url": "http://x/v1"}, "takes no --base-url"),
    ):
        config = make(tmp_path, part, **fields)
        assert config.sample is not None
        with pytest.raises(ConfigError) as error:
            run_sampling(config, config.sample)
        assert message in str(error.value)
    for fields in ({"engine": "server"}, {"base_url": "http://x/v1"}, {"stop": [""]}, {"min_p": 1.0}, {"top_k": -1}):
        with pytest.raises(ValueError, match=r"server|stop|min_p|top_k"):
            make(tmp_path, "evaluate", **fields)


def test_keys_of_earlier_stages_stay_and_a_choice_changes_them(tmp_path: Path) -> None:
    def key(**fields: Any) -> dict[str, Any]:
        config = make(tmp_path, "sample", **fields)
        assert config.sample is not None
        return _decoding(config, config.sample)

    assert set(key()) == {"prompts", "num_generations", "max_new_tokens", "temperature", "top_p", "batch_size",
                          "chat_template_kwargs", "label_scale"}  # fmt: skip
    for fields in ({"top_k": 3}, {"stop": ["x"]}, {"dtype": "bfloat16"}, {"base_url": "http://x/v1"}, {"min_p": 0.1}):
        assert key(**fields) != key()


def test_a_system_prompt_comes_first_and_one_of_a_prompt_stays(tmp_path: Path) -> None:
    config = make(tmp_path, "sample", system_prompt="be kind")
    assert config.sample is not None
    with pytest.raises(AlignError, match="found plain text"):
        section_prompts(config.sample)
    user, own = {"role": "user", "content": "hi"}, {"role": "system", "content": "be short"}
    rows: list[dict[str, Any]] = [{"prompt": [user], "tools": [{"name": "t"}]}, {"prompt": [own, user]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = section_prompts(config.sample)
    assert first["messages"] == [{"role": "system", "content": "be kind"}, user] and first["tools"]
    assert second == [own, user]
