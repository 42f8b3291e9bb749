"""Tables of an evaluation: completions of each policy, their log-probs, a judge's scores and preferences.

Each table is a stage with its own folder under the output. The folder is named after the policy and the stage key, so
that another verb, another judge or a repeated command reuses it:

    OUTPUT/completions/<policy>-<digits>/completions.parquet   prompt, text, token_ids, finished
    OUTPUT/log-probs/<policy>-<digits>/log-probs.parquet       logp_policy, logp_reference, kl
    OUTPUT/scores/<policy>-<digits>/scores.parquet             score
    OUTPUT/judgements/<a>-<b>-<digits>/judgements.parquet      shown_first, shown_second
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from align.config import ClusterSection
from align.evaluation.compare_policies import KlSamples, first_samples
from align.evaluation.left_out import completed_by_all
from align.evaluation.policies import Policy
from align.evaluation.text_statistics import Texts
from align.generation.engines import choose_engine
from align.generation.logp_job import LogpJob
from align.generation.sampling_job import SamplingJob, completions_of, sample_prompts
from align.generation.types import SAMPLING, Completion, Sampling, as_completion
from align.generation.vllm_adapters import check_vllm_adapter, served_otherwise
from align.io.hashing import digest
from align.io.stage import run_stage
from align.models.folders import adapter_base, fingerprint_model
from align.sharding.jobs import read_table
from align.sharding.shards import in_parts, map_shards
from reward_models.judges import Judge
from reward_models.loading import DEFAULTS, LoadOptions
from reward_models.pairwise_judges import (
    ByScore,
    PairwiseJudge,
    RewardModelJudge,
    from_scores,
    judge_key,
    make_pairwise,
    prefer_in_both_orders,
)
from reward_models.questions import SERVER

PART = 64
"""Prompts per shard; a stopped evaluation repeats at most one shard."""
KEY_DIGITS = 8
COMPLETIONS = "completions"
PARTS = "parts"
KL_REVISION = 2
"""Revision of the log-probs and the KL, part of their stage keys."""


@dataclass(frozen=True, slots=True)
class Written:
    """The completions of one policy, one for each of N prompts."""

    policy: Policy
    prompts: Sequence[Any]
    sampling: Sampling
    table: Dataset
    """``prompt`` (messages as JSON), ``text``, ``token_ids``, ``finished``; null, all but the prompt, where the policy
    could not complete it, see ``on_same_prompts``."""
    key: str
    """Stage key of the table: sha256 of everything that it was made from."""

    def answers(self) -> list[Any]:
        """The completions in the form of their prompts: text, or one assistant message."""
        return [as_completion(prompt, text) for prompt, text in zip(self.prompts, self.table["text"], strict=True)]

    def texts(self) -> Texts:
        """The completions as their statistics read them."""
        return Texts(self.table["text"], [len(ids) for ids in self.table["token_ids"]], self.table["finished"])


def write_completions(
    policy: Policy, prompts: Sequence[Any], sampling: Sampling, output: Path, cluster: ClusterSection | None = None
) -> Written:
    """Sample one completion of each prompt by a policy; a prompt that it cannot take has none, see ``on_same_prompts``.

    Args:
        policy: the model.
        prompts: N prompts, text or messages.
        sampling: with n = 1.
        output: folder of the evaluation.
        cluster: the cluster whose workers share the prompts; no result depends on it.

    Raises:
        ModelError: the policy cannot be loaded, or has no chat template for messages.
        ValueError: another n.
    """
    if sampling.n != 1:
        raise ValueError(f"expected n = 1, got n = {sampling.n}")
    engine = choose_engine(sampling.engine)[0]
    if engine == "vllm":
        check_vllm_adapter(policy.model)
    inputs = {
        "prompts": digest(list(prompts)),
        "model": _fingerprint(policy.model),
        "sampling": sampling.made_from(),
        "engine": engine,
        "part": PART,
        "revision": SAMPLING,
    }

    if engine == "vllm" and (reason := served_otherwise(policy.model)) is not None:
        inputs["merged"] = reason

    job = SamplingJob(policy.model, replace(sampling, engine=engine))

    def work(parts: Path) -> Dataset:
        what = f"completions of {policy.name}"
        sampled = sample_prompts(list(prompts), job, parts, size=PART, what=what, cluster=cluster)
        return completions_table(prompts, completions_of(sampled))

    table, key = _table_stage(output, COMPLETIONS, policy.name, inputs, work)
    return Written(policy, prompts, sampling, table, key)


def completions_table(prompts: Sequence[Any], groups: Sequence[Sequence[Completion]]) -> Dataset:
    """The table of a policy's completions, one or none of each of N prompts; see ``Written.table``."""
    first = [group[0] if group else None for group in groups]
    texts = [prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
    table = {
        "prompt": texts,
        "text": [one and one.text for one in first],
        "token_ids": [one and one.token_ids for one in first],
        "finished": [one and one.finish_reason == "stop" for one in first],
    }
    types = {"token_ids": List(Value("int64")), "finished": Value("bool")}
    return Dataset.from_dict(table, features=Features(dict.fromkeys(table, Value("string")) | types))


def on_same_prompts(written: Sequence[Written]) -> tuple[list[Written], dict[str, Any]]:
    """The completions of the prompts that every policy could complete, and what is left out (``Kept.left_out``).

    Args:
        written: completions of the same N prompts; a policy may be there several times.

    Raises:
        DataError: there is no such prompt.
    """
    completed: dict[str, list[bool]] = {}
    for one in written:
        done = [text is not None for text in one.table["text"]]
        known = completed.setdefault(one.policy.name, done)
        completed[one.policy.name] = [a and b for a, b in zip(known, done, strict=True)]
    kept = completed_by_all(written[0].prompts, completed)
    if not kept.left_out:
        return list(written), {}
    return [
        replace(
            one,
            prompts=[one.prompts[k] for k in kept.rows],
            table=one.table.select(kept.rows),
            key=digest({"completions": one.key, "rows": kept.rows}),
        )
        for one in written
    ], kept.left_out


def measure_kl(written: Written, reference: Policy, output: Path, cluster: ClusterSection | None = None) -> KlSamples:
    """KL(policy || reference) of each completion, nats: exact for each next token, and by one sample.

    The policy is what was sampled from, the reference the model at temperature 1; see ``align.models.sample_kl``.

    Raises:
        ModelError: a model cannot be loaded, or the two do not share a vocabulary.
    """
    inputs = {"completions": written.key, "reference": _fingerprint(reference.model), "revision": KL_REVISION}
    job = LogpJob(written.policy.model, reference.model, written.sampling)

    def work(parts: Path) -> Dataset:
        prompts, ids = [json.dumps(prompt) for prompt in written.prompts], written.table["token_ids"][:]
        rows, what = Dataset.from_dict({"prompt": prompts, "token_ids": ids}), f"log-probs of {written.policy.name}"
        return map_shards(rows, job, parts, size=PART, what=what, cluster=cluster).whole()

    table, _ = _table_stage(output, "log-probs", written.policy.name, inputs, work)
    return KlSamples.of_table(table)


def kl_of(written: Written, reference: Policy, output: Path, cluster: ClusterSection | None = None) -> KlSamples | None:
    """``measure_kl``; None for the reference as it is, whose KL is 0."""
    if written.policy.model == reference.model and written.sampling.as_it_is:
        return None
    return measure_kl(written, reference, output, cluster)


def samples_of(written: Mapping[str, Written], rewards: Mapping[str, np.ndarray], shown: int) -> list[dict[str, Any]]:
    """The first prompts with what every policy wrote; see ``first_samples``."""
    prompts = next(iter(written.values())).prompts
    return first_samples(prompts, {name: found.table["text"] for name, found in written.items()}, rewards, shown)


def score(written: Written, judge: Judge, output: Path, max_length: int | None = None) -> np.ndarray:
    """Score of each completion by a judge, [N]; ``max_length`` is the limit that the judge was made with."""
    options = judge.options if isinstance(judge, RewardModelJudge) else DEFAULTS
    inputs = {"completions": written.key, "judge": judge_key(judge.name, options)} | _limit(max_length)

    def work(parts: Path) -> Dataset:
        answers = written.answers()

        def part(rows: range) -> Dataset:
            prompts, completions = [written.prompts[k] for k in rows], [answers[k] for k in rows]
            return Dataset.from_dict({"score": judge.score(prompts, completions)})

        return in_parts(len(written.table), PART, parts, part, what=f"scores of {written.policy.name}")

    return np.asarray(_table_stage(output, "scores", written.policy.name, inputs, work)[0]["score"])


def comparing_judge(
    name: str, output: Path, max_length: int | None, options: LoadOptions, base_url: str | None
) -> PairwiseJudge:
    """The judge of a comparison; a server's answers are kept in ``output``, so that none is asked for twice.

    Raises:
        ConfigError, ModelError: see ``make_pairwise``.
    """
    key = digest([name.removeprefix(SERVER), base_url])[:KEY_DIGITS]
    cache = output / "judgements" / f"answers-{key}.jsonl"
    return make_pairwise(name, max_length, options, base_url=base_url, cache=cache)


def judge_pairs(
    first: Written, second: Written, judge: PairwiseJudge, output: Path, max_length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Preference for ``first``'s completion when it is shown first and when it is shown second, [N] each, in [0, 1].

    A judge that scores single responses does not see the order and is asked once.
    """
    if isinstance(judge, ByScore):
        verdict = from_scores(*(score(written, judge.judge, output, max_length) for written in (first, second)))
        return verdict, verdict
    inputs = {"completions": [first.key, second.key], "judge": judge_key(judge.name)} | _limit(max_length)

    def work(parts: Path) -> Dataset:
        answers = first.answers(), second.answers()

        def part(rows: range) -> Dataset:
            prompts = [first.prompts[k] for k in rows]
            ours, theirs = ([of_policy[k] for k in rows] for of_policy in answers)
            verdicts = prefer_in_both_orders(judge, prompts, ours, theirs)
            return Dataset.from_dict({"shown_first": verdicts[0], "shown_second": verdicts[1]})

        return in_parts(len(first.table), PART, parts, part, what="judgements")

    table, _ = _table_stage(output, "judgements", f"{first.policy.name}-{second.policy.name}", inputs, work)
    return np.asarray(table["shown_first"]), np.asarray(table["shown_second"])


def _table_stage(
    output: Path, kind: str, name: str, inputs: dict[str, Any], work: Callable[[Path], Dataset]
) -> tuple[Dataset, str]:
    """Run a stage that writes one table; return the table and the stage key. The shards are deleted at the end."""
    folder = output / kind / f"{name}-{digest(inputs)[:KEY_DIGITS]}"
    file = f"{kind}.parquet"

    def make(target: Path) -> None:
        work(target / PARTS).to_parquet(str(target / file))
        shutil.rmtree(target / PARTS)

    stage = run_stage(f"{kind} of {name}", folder, inputs, make)
    return read_table(folder / file), stage.key


def _limit(max_length: int | None) -> dict[str, int]:
    """The part of a stage key that a judge's ``max_length`` adds; nothing at its default."""
    return {} if max_length is None else {"max_length": max_length}


def _fingerprint(source: str) -> str:
    """Fingerprint of a model, cached until one of its files changes: a caller may write another policy there."""
    folders = [Path(name) for name in (source, adapter_base(source)) if name]
    files = sorted(file for folder in folders if folder.is_dir() for file in folder.rglob("*") if file.is_file())
    states = ((file, file.stat()) for file in files)
    return _hashed(source, tuple((str(file), state.st_size, state.st_mtime_ns, state.st_ino) for file, state in states))


@cache
def _hashed(source: str, _states: tuple[tuple[str, int, int, int], ...]) -> str:
    return fingerprint_model(source)


@cache
def _tokenizer(model: str) -> Any:
    from align.models.loading import load_tokenizer

    return load_tokenizer(model)
