"""What each policy writes for each prompt, how probable it is, what a judge gives it: tables that are made once.

Each is a stage in a folder of its own under the output, named after the policy and what it was made from, so that
another verb, another judge or the same command again finds it:

    OUTPUT/completions/<policy>-<digits>/completions.parquet   prompt, text, token_ids, finished
    OUTPUT/log-probs/<policy>-<digits>/log-probs.parquet       logp_policy, logp_reference
    OUTPUT/scores/<policy>-<digits>/scores.parquet             score
    OUTPUT/judgements/<a>-<b>-<digits>/judgements.parquet      shown_first, shown_second
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value

from align.config import ClusterSection
from align.data.prompts import load_prompts
from align.errors import ConfigError, DataError, ModelError
from align.evaluation.policies import Policy
from align.generation.engines import EngineName, choose_engine, make_engine
from align.generation.types import SAMPLING, Sampling, keyed_prompts
from align.io.hashing import digest
from align.io.stage import run_stage
from align.models.folders import adapter_base, fingerprint_model
from align.sharding.jobs import Work, read_table
from align.sharding.shards import in_parts, map_shards
from reward_models.judges import Judge
from reward_models.loading import DEFAULTS
from reward_models.pairwise_judges import ByScore, PairwiseJudge, RewardModelJudge, from_scores, judge_key

PART = 64
"""Prompts per part; a stopped evaluation makes at most one of them again."""
KEY_DIGITS = 8
COMPLETIONS = "completions"
KL_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Decoding:
    """How completions are sampled. The whole distribution is sampled from (top_p 1): anything else has no KL.

    Raises:
        ConfigError: the engine is a server.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    batch_size: int
    """Rows per forward pass of the transformers engine; the completions do not depend on it."""
    engine: EngineName = "auto"
    cluster: ClusterSection | None = None
    """Whose workers share the prompts; no result depends on it."""

    def __post_init__(self) -> None:
        if self.engine == "server":
            raise ConfigError(
                "--engine server: found a server, expected auto, vllm or transformers",
                code="engine-option",
                hint="policies are read from their folders here, because KL and checkpoints need their weights",
            )

    def sampling(self) -> Sampling:
        """One completion per prompt."""
        return Sampling(self.max_new_tokens, self.temperature, 1.0, n=1, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Written:
    """The completions of one policy, one for each of N prompts."""

    policy: Policy
    prompts: Sequence[Any]
    decoding: Decoding
    table: Dataset
    """``prompt`` (messages as JSON), ``text``, ``token_ids``, ``finished``."""
    key: str
    """sha256 of everything that the table was made from."""

    def answers(self) -> list[Any]:
        """The completions in the format of their prompts: text, or one assistant message."""
        texts = self.table["text"]
        return [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.prompts, texts, strict=True)
        ]


def read_prompts(path: str, limit: int | None) -> list[Any]:
    """The first ``limit`` prompts of a file, a folder of Parquet files or a pattern, on a disk or in an object store.

    Raises:
        DataError: the file is missing, wrong or empty.
    """
    prompts = load_prompts(path)[:limit]
    if not prompts:
        raise DataError(f"{path}: holds no prompt", code="data-empty", hint='one {"prompt": ...} per line')
    return prompts


def write_completions(policy: Policy, prompts: Sequence[Any], decoding: Decoding, output: Path) -> Written:
    """One completion of each prompt by a policy.

    Raises:
        ModelError: the policy cannot be loaded, or has no chat template for messages.
    """
    engine = choose_engine(decoding.engine)[0]
    inputs = {
        "prompts": digest(list(prompts)),
        "model": _fingerprint(policy.model),
        "sampling": asdict(decoding.sampling()),
        "engine": engine,
        "part": PART,
        "revision": SAMPLING,
    }

    job = CompletionJob(policy.model, replace(decoding, engine=engine, cluster=None))

    def work(parts: Path) -> Dataset:
        rows, what = keyed_prompts(prompts), f"completions of {policy.name}"
        return map_shards(rows, job, parts, size=PART, what=what, cluster=decoding.cluster).whole()

    table, key = _table_stage(output, COMPLETIONS, policy.name, inputs, work)
    return Written(policy, prompts, decoding, table, key)


def measure_kl(written: Written, reference: Policy, output: Path) -> np.ndarray:
    """log policy(y) - log reference(y) of each completion, [N], nats; the reference at temperature 1.

    Raises:
        ModelError: a model cannot be loaded, or the two do not share a vocabulary.
    """
    inputs = {"completions": written.key, "reference": _fingerprint(reference.model)}
    job = LogpJob(written.policy.model, reference.model, written.decoding.temperature)

    def work(parts: Path) -> Dataset:
        prompts, ids = [json.dumps(prompt) for prompt in written.prompts], written.table["token_ids"][:]
        rows, what = Dataset.from_dict({"prompt": prompts, "token_ids": ids}), f"log-probs of {written.policy.name}"
        return map_shards(rows, job, parts, size=PART, what=what, cluster=written.decoding.cluster).whole()

    table, _ = _table_stage(output, "log-probs", written.policy.name, inputs, work)
    return np.asarray(table["logp_policy"]) - np.asarray(table["logp_reference"])


def score(written: Written, judge: Judge, output: Path, max_length: int | None = None) -> np.ndarray:
    """What a judge that gives numbers says of each completion, [N]; ``max_length`` is what it was made with."""
    options = judge.options if isinstance(judge, RewardModelJudge) else DEFAULTS
    inputs = {"completions": written.key, "judge": judge_key(judge.name, options)} | _limit(max_length)

    def work(parts: Path) -> Dataset:
        answers = written.answers()

        def part(rows: range) -> Dataset:
            chosen = [written.prompts[k] for k in rows], [answers[k] for k in rows]
            return Dataset.from_dict({"score": judge.score(*chosen)})

        return in_parts(len(written.table), PART, parts, part, what=f"scores of {written.policy.name}")

    return np.asarray(_table_stage(output, "scores", written.policy.name, inputs, work)[0]["score"])


def judge_pairs(
    first: Written, second: Written, judge: PairwiseJudge, output: Path, max_length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Preference for ``first``'s completion where it is shown first and where it is shown second, [N] each.

    A judge that scores responses one by one never sees the order and is asked once.
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
            verdicts = judge.prefer(prompts, ours, theirs), 1 - judge.prefer(prompts, theirs, ours)
            return Dataset.from_dict({"shown_first": verdicts[0], "shown_second": verdicts[1]})

        return in_parts(len(first.table), PART, parts, part, what="judgements")

    table, _ = _table_stage(output, "judgements", f"{first.policy.name}-{second.policy.name}", inputs, work)
    return np.asarray(table["shown_first"]), np.asarray(table["shown_second"])


@dataclass(frozen=True, slots=True)
class CompletionJob:
    """One completion of each prompt (JSON) of a shard, drawn under its key."""

    model: str
    decoding: Decoding

    def start(self) -> Work:
        """Load the engine."""
        engine = make_engine(self.decoding.engine, self.model, batch_size=self.decoding.batch_size)
        sampling = self.decoding.sampling()

        def work(rows: Dataset) -> Dataset:
            wanted = [json.loads(prompt) for prompt in rows["prompt"]]
            found = [group[0] for group in engine.generate(wanted, sampling, list(rows["key"]))]
            texts = [prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False) for prompt in wanted]
            table = {
                "prompt": texts,
                "text": [one.text for one in found],
                "token_ids": [one.token_ids for one in found],
                "finished": [one.finish_reason == "stop" for one in found],
            }
            return Dataset.from_dict(table).cast_column("token_ids", List(Value("int64")))

        return work


@dataclass(frozen=True, slots=True)
class LogpJob:
    """Log-probs of the completions (``token_ids``) of a shard under the policy as it was decoded and the reference."""

    policy: str
    reference: str
    temperature: float

    def start(self) -> Work:
        """Load both models."""
        import torch

        from align.models.completion_logps import completion_logps
        from align.models.loading import load_policy
        from align.models.tokenization import encode_prompt

        tokenizer = _tokenizer(self.policy)
        if tokenizer.get_vocab() != _tokenizer(self.reference).get_vocab():
            raise ModelError(
                f"{self.policy} and {self.reference}: found two vocabularies, expected one",
                code="eval-tokenizer",
                hint="give the reference that the policy was trained from",
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        scorers: list[Any] = []
        for model, heat in ((self.policy, self.temperature), (self.reference, 1.0)):
            settings = {"batch_tokens": KL_BATCH_TOKENS, "pad_token_id": tokenizer.pad_token_id, "temperature": heat}
            loaded = load_policy(model, dtype="float32").to(device).eval()
            scorers.append(partial(completion_logps, loaded, **settings))

        def work(rows: Dataset) -> Dataset:
            ids = [encode_prompt(json.loads(prompt), tokenizer) for prompt in rows["prompt"]]
            scores = [score(ids, rows["token_ids"][:]) for score in scorers]
            return Dataset.from_dict({"logp_policy": scores[0], "logp_reference": scores[1]})

        return work


def _table_stage(
    output: Path, kind: str, name: str, inputs: dict[str, Any], work: Callable[[Path], Dataset]
) -> tuple[Dataset, str]:
    """A stage whose artefact is one table, and its key; the parts go once the table is whole."""
    folder = output / kind / f"{name}-{digest(inputs)[:KEY_DIGITS]}"
    file = f"{kind}.parquet"

    def make(target: Path) -> None:
        work(target / "parts").to_parquet(str(target / file))
        shutil.rmtree(target / "parts")

    stage = run_stage(f"{kind} of {name}", folder, inputs, make)
    return read_table(folder / file), stage.key


def _limit(max_length: int | None) -> dict[str, int]:
    """What a limit of a judge's own adds to the key of its verdicts."""
    return {} if max_length is None else {"max_length": max_length}


def _fingerprint(source: str) -> str:
    """Hashed once for as long as no file changes: a caller may write another policy to the same folder."""
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
