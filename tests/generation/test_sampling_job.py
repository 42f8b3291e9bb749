"""The sampling job gives what its engine gives: in shards of any size, in another process, with log-probs."""

import pickle
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.config import RunConfig
from align.errors import DataError
from align.generation.sampling_job import SamplingJob, completions_of, sample_prompts
from align.generation.types import Sampling, keyed_prompts
from align.models import loading
from align.run.stages.sampling import run_sampling
from align.sharding.jobs import decode, encode
from tests.helpers.builders import causal

PROMPTS = ["the film is", "a very bad plot was not", "good", [{"role": "user", "content": "good film"}]]
SAMPLING = Sampling(6, top_p=0.9, n=3, seed=2, engine="transformers", batch_size=4)


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("size", [1, 3, 9])
def test_shards_hold_the_completions_of_the_engine(
    size: int, logprobs: bool, tiny_policy: Path, tmp_path: Path
) -> None:
    job = SamplingJob(str(tiny_policy), replace(SAMPLING, logprobs=logprobs))
    found = completions_of(sample_prompts(PROMPTS, job, tmp_path, size=size, what="sampling"))
    expected = job.load().generate(PROMPTS, job.sampling)
    assert [len(group) for group in found] == [3] * len(PROMPTS)
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        assert replace(one, logprobs=None) == replace(other, logprobs=None)
        assert one.logprobs == (pytest.approx(other.logprobs, abs=1e-5) if logprobs else None)


def test_the_job_and_its_result_travel(tiny_policy: Path) -> None:
    """A cluster pickles the job and sends the shards as Parquet files."""
    job = SamplingJob(str(tiny_policy), replace(SAMPLING, options={"dtype": "float32"}))
    sent = pickle.loads(pickle.dumps(job))
    rows = keyed_prompts(PROMPTS, keys=list("abcd"))
    assert sent == job
    assert completions_of(decode(encode(sent.start()(decode(encode(rows)))))) == job.load().generate(
        PROMPTS, job.sampling, keys=list("abcd")
    )


def test_log_probs_of_every_sample(tiny_policy: Path, tmp_path: Path) -> None:
    """They are equal under the policy itself and differ under another model; no sample depends on the reference."""
    sampling = replace(SAMPLING, top_p=1.0)
    other = str(causal(tmp_path / "other", seed=5))
    plain = SamplingJob(str(tiny_policy), sampling).start()(keyed_prompts(PROMPTS))
    itself, against = (
        SamplingJob(str(tiny_policy), sampling, reference).start()(keyed_prompts(PROMPTS))
        for reference in (str(tiny_policy), other)
    )
    assert itself["completions"][:] == plain["completions"][:] == against["completions"][:]
    assert [len(group) for group in itself["logp_policy"]] == [3] * len(PROMPTS)
    assert itself["logp_policy"][:] == itself["logp_reference"][:]
    for one, two in zip(against["logp_policy"], against["logp_reference"], strict=True):
        assert all(policy != reference for policy, reference in zip(one, two, strict=True))
    assert itself["kl"][:] == [[0.0] * 3] * len(PROMPTS) and min(chain(*against["kl"])) > 0
    assert sum(itself["logp_policy"][0]) == pytest.approx(sum(against["logp_policy"][0]), abs=1e-4)


def test_the_part_of_a_key_is_what_decides_the_draws() -> None:
    """A user's finished stages have exactly these fields in their keys."""
    everywhere = replace(SAMPLING, engine="auto", batch_size=1, base_url="http://x/v1", options={"dtype": "bfloat16"})
    assert everywhere.made_from() == SAMPLING.made_from()
    assert SAMPLING.made_from() == {
        "max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9, "n": 3, "seed": 2, "logprobs": False,
    }  # fmt: skip
    cut = replace(SAMPLING, top_k=3, min_p=0.1, stop=("x",))
    added = {"top_k": 3, "min_p": 0.1, "stop": ["x"]}
    assert cut.made_from() == SAMPLING.made_from() | added
    assert set(asdict(SAMPLING)) - set(cut.made_from()) == {"engine", "batch_size", "base_url", "options"}


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_model_runs_only_if_it_is_trusted(
    trusted: bool, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy, reference and tokenizer are loaded with the run's own setting."""
    asked: list[bool] = []
    for name in ("load_policy", "load_tokenizer"):
        load = getattr(loading, name)

        def recorded(model: str, load: Any = load, **fields: Any) -> Any:
            asked.append(fields.get("trust_remote_code", False))
            return load(model, **fields)

        monkeypatch.setattr(loading, name, recorded)
    train = {"model": str(tiny_policy), "methods": {"dpo": {"loss": "dpo"}}, "trainer": {"trust_remote_code": trusted}}
    evaluate = {"prompts": "q", "max_new_tokens": 2, "judge": "vader"}
    tree = {"name": "r", "pairs": {"path": "p"}, "train": train, "evaluate": evaluate}
    config = RunConfig.model_validate(tree)
    assert config.evaluate is not None
    sampling = run_sampling(config, config.evaluate)
    SamplingJob(str(causal(tmp_path / "trained")), sampling, str(tiny_policy)).start()
    assert asked == [trusted] * 3


def test_a_prompt_beyond_the_window_has_no_completions_and_no_log_probs(tiny_policy: Path) -> None:
    rows = keyed_prompts(["good", "very " * 128, "film"], keys=["a", "too-long", "b"])
    job = SamplingJob(str(tiny_policy), replace(SAMPLING, top_p=1.0), str(tiny_policy))
    found = decode(encode(job.start()(rows)))
    assert [len(group) for group in completions_of(found)] == [3, 0, 3]
    alone = job.start()(keyed_prompts(["good", "film"], keys=["a", "b"]))
    for name in ("logp_policy", "logp_reference"):
        assert [len(group) for group in found[name]] == [3, 0, 3]
        assert np.allclose(found[name][0] + found[name][2], alone[name][0] + alone[name][1], atol=1e-5)
    with pytest.raises(DataError, match="too-long"):
        job.load().generate(["good", "very " * 128], SAMPLING, ["a", "too-long"])
