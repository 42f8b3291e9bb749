"""``compare_policies``: which of two policies writes the better completions, by a judge."""

import copy
import inspect
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from align.commands.compare import compare_written, win_sentence
from align.commands.evaluation_job import decoding_of
from align.commands.evaluation_tables import Written, completions_table, on_same_prompts, write_completions
from align.data.messages import as_messages
from align.data.readers import Row
from align.data.validation import RowReader
from align.errors import ConfigError, DataError, ModelError, listed, python_words
from align.evaluation.policies import NAME, REFERENCE, Policy
from align.generation.types import Completion, Engine, Sampling
from align.io.hashing import digest
from align.models.loading import load_tokenizer
from align.models.message_checks import check_prompts_of
from reward_models.pairwise_judges import ByScore, PairwiseJudge, make_pairwise, prefer_in_both_orders
from reward_models.questions import REWARD_SERVER

SHOWN = 100
"""Prompts whose completions the page shows."""
HINTS = {
    "judge-name": 'give "vader", "yes-no:MODEL", "llm:MODEL", the folder or hub id of a reward model, a RewardModel, '
    "or an object with `name` and `score` or `prefer`",
    "data-empty": "give at least one prompt",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Head-to-head result of policy A against policy B."""

    win_rate: float
    """Mean preference for A over the prompts and over both orders, in [0, 1]; a tie counts half."""
    interval: tuple[float, float] | None
    """95% interval of ``win_rate`` over the prompts; None if the data give none: one prompt, or ties only."""
    table: Dataset
    """One row per prompt and repetition: ``prompt``, ``a``, ``b`` (the completions) and ``preference`` for A."""
    details: dict[str, Any] = field(repr=False)
    """All numbers as `align eval compare` writes them into report.json: wins, ties, losses, position bias, the win rate
    at equal lengths, statistics of the texts."""

    @property
    def summary(self) -> str:
        """The win rate with its interval in a sentence, plain and at equal lengths."""
        return win_sentence(self.details)

    def write_page(self, path: str | Path) -> None:
        """Write the page of `align eval compare`, one HTML file without requests, to ``path``."""
        from align.reports.comparison_page import write_comparison_page

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        found = self.details
        write_comparison_page(target, {"comparisons": {f"{found['a']} against {found['b']}, {found['judge']}": found}})


def compare_policies(
    a: str | Path | nn.Module | Engine,
    b: str | Path | nn.Module | Engine,
    prompts: Sequence[Any],
    *,
    judge: str | Any,
    max_new_tokens: int = 256,
    n: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 64,
    max_length: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    independent_seeds: bool = False,
) -> Comparison:
    """Let two policies complete the same prompts and ask a judge, in both orders, which completion is better.

    `align eval compare` computes the same from files. Do not take as judge what one of the policies was trained on: a
    policy that was optimized for a reward model wins by it whether or not it is better. A prompt that one of the two
    cannot complete, such as one that fills its window, is left out for both, with a warning; ``details`` counts them.

    Args:
        a: policy A: folder (also an adapter's), hub id, or loaded model, which is sampled on the GPU if there is one;
            or an ``align.generation.types.Engine``, which completes the prompts as it likes, each under its key.
        b: policy B.
        prompts: texts or lists of messages; a column of a Dataset too.
        judge: name of a judge (``vader``, ``yes-no:MODEL``, ``llm:MODEL``), folder or hub id of a reward model, a
            ``RewardModel``, or an object with a ``name`` and ``score(prompts, completions)`` -> [N] or
            ``prefer(prompts, first, second)`` -> [N] in [0, 1]. There is no default.
        max_new_tokens: tokens of a completion, at most.
        n: completions of each policy per prompt, which counts once, also if it is given twice, with their mean.
        seed: seed of the sampling.
        temperature: temperature of the sampling; 0 is greedy.
        batch_size: completions per forward pass; no completion depends on it.
        max_length: tokens that a reward model or ``llm:`` judge reads; None: 1024.
        tokenizer: tokenizer of the loaded models; None: that of the folder or hub id they were loaded from.
        independent_seeds: B samples with ``seed + 1``; by default both have the same random numbers, which makes the
            interval narrower where the policies are close, and many of their texts identical.

    Raises:
        ConfigError: a policy, a number or the judge is none that can be used.
        DataError: there are no prompts, some cannot be used (all are counted), or no prompt is completed by both.
        ModelError: a model or its tokenizer cannot be loaded.
    """
    started = time.monotonic()
    with python_words(HINTS):
        _check_numbers(temperature, max_new_tokens=max_new_tokens, n=n, batch_size=batch_size)
        texts = _checked_prompts(prompts)
        both = _named(a, b)
        _check_templates(texts, both, judge)
        asked = _judge(judge, max_length)
        sampling = Sampling(max_new_tokens, temperature, seed=seed, batch_size=batch_size)
        kept, left_out = _both_written(both, texts * n, sampling, (seed, seed + independent_seeds), tokenizer)
        written = {one.policy.name: one for one in kept}
        ours, theirs = written.values()
        preferences = prefer_in_both_orders(asked, list(ours.prompts), ours.answers(), theirs.answers())
        decoding = decoding_of(sampling, independent_seeds=independent_seeds)
        run = _run(asked, texts, both, decoding, n, started, left_out)
        details = compare_written(written, asked, preferences, shown=SHOWN, run=run)
    return _result(details, written, (preferences[0] + preferences[1]) / 2)


def _both_written(
    policies: Sequence[tuple[Policy, Any]],
    prompts: list[Any],
    sampling: Sampling,
    seeds: tuple[int, int],
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[list[Written], dict[str, Any]]:
    """The completions of both policies where both have one, and what is left out, see ``on_same_prompts``."""
    with TemporaryDirectory(prefix="compare-") as folder:
        drawn = [
            _written(policy, loaded, prompts, replace(sampling, seed=seed), Path(folder), tokenizer)
            for (policy, loaded), seed in zip(policies, seeds, strict=True)
        ]
        return on_same_prompts(drawn)


def _run(
    judge: PairwiseJudge,
    prompts: list[Any],
    policies: Sequence[tuple[Policy, Any]],
    decoding: dict[str, Any],
    n: int,
    started: float,
    left_out: dict[str, Any],
) -> dict[str, Any]:
    """How the comparison was made, for its page."""
    return {
        "command": f"compare_policies(a, b, prompts, judge={judge.name!r}, n={n})",
        "prompts": "prompts",
        "n_prompts": len(prompts) - left_out.get("count", 0) // n,
        **({"left_out": left_out} if left_out else {}),
        "judge": judge.name,
        "policies": {policy.name: policy.model or _described(loaded) for policy, loaded in policies},
        "decoding": decoding,
        "seconds": round(time.monotonic() - started, 1),
    }


def _described(loaded: Any) -> str:
    return f"the engine {loaded.name}" if isinstance(loaded, Engine) else "a loaded model"


def _result(details: dict[str, Any], written: dict[str, Written], preference: np.ndarray) -> Comparison:
    rate = details["win_rate"]["rate"]
    ours, theirs = written.values()
    columns = {"prompt": ours.table["prompt"], "a": ours.table["text"], "b": theirs.table["text"]}
    interval = None if rate["low"] is None else (rate["low"], rate["high"])
    table = Dataset.from_dict({**{key: list(values) for key, values in columns.items()}, "preference": preference})
    return Comparison(rate["value"], interval, table, details)


def _check_templates(prompts: list[Any], policies: Sequence[tuple[Policy, Any]], judge: Any) -> None:
    """Check that the chat templates of models in folders take the prompts, a judge's with an answer.

    Raises:
        ModelError, DataError: see ``check_prompts_of``.
    """
    check_prompts_of(prompts, [policy.model for policy, _ in policies if policy.model])
    scorer = judge.removeprefix(REWARD_SERVER) if isinstance(judge, str) else None
    check_prompts_of(prompts, [scorer] if scorer and Path(scorer).is_dir() else [], answered=True)


def _check_numbers(temperature: float, **numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: found {value!r}, expected a whole number of at least 1", code="config-option")
    if temperature < 0:
        raise ConfigError(f"temperature: found {temperature}, expected 0 or more", code="config-option")


def _checked_prompts(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | bytes | dict | Dataset) or not hasattr(prompts, "__iter__"):
        raise DataError(
            f"prompts: found a {type(prompts).__name__}, expected a list of texts or of lists of messages",
            code="data-type",
            hint='give one prompt per entry; of a Dataset its column: ds["prompt"]',
        )
    rows = [Row(number, {"prompt": as_messages(prompt)}) for number, prompt in enumerate(prompts)]
    if not rows:
        raise DataError("prompts: holds no prompt", code="data-empty")
    reader = RowReader("prompts", {"prompt"})
    lines = [f"prompts[{row.number}]: {wrong}" for row in rows if (wrong := _wrong(reader, row)) is not None]
    if lines:
        raise DataError(
            f"prompts: {len(lines)} of {len(rows)} cannot be used:\n{listed(lines)}",
            code="prompt-row",
            hint="give text, or messages [{role: ..., content: ...}]",
        )
    return [row.values["prompt"] for row in rows]


def _wrong(reader: RowReader, row: Row) -> str | None:
    """What is wrong with a prompt; None if it is valid."""
    for item in reader.text(row, "prompt"):
        return f"found {item.found}, expected {item.expected}"
    prompt = row.values["prompt"]
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        return "found a last message by assistant, expected one by user or tool"
    return None


def _named(a: Any, b: Any) -> tuple[tuple[Policy, Any], tuple[Policy, Any]]:
    """Both policies, each with the model or engine if it is loaded; then the model of its ``Policy`` is empty."""
    for name, policy in (("a", a), ("b", b)):
        if not isinstance(policy, str | Path | nn.Module | Engine) or policy == "":
            raise ConfigError(
                f"{name}: found {policy!r}, expected a model's folder, hub id, a loaded model or an Engine",
                code="eval-policy",
            )
        if isinstance(policy, Engine) and not isinstance(getattr(policy, "name", None), str):
            raise ConfigError(f"{name}: found an engine without a name, expected one", code="eval-policy")
        if isinstance(policy, Engine):
            _check_call(name, policy.stream, ("prompts", "sampling", "keys"), "eval-policy")
    sources = [_source(one) for one in (a, b)]
    paths = [Path(source) for source in sources]
    names = [(path.parent.name if path.name == "model" else path.name).removeprefix("train-") for path in paths]
    if names[0] == names[1] or not all(NAME.fullmatch(name) and name != REFERENCE for name in names):
        names = ["a", "b"]
    (one, other) = (
        (Policy(name, ""), policy) if isinstance(policy, nn.Module | Engine) else (Policy(name, str(policy)), None)
        for name, policy in zip(names, (a, b), strict=True)
    )
    return one, other


def _source(policy: Any) -> str:
    """What a policy is named after."""
    if isinstance(policy, Engine):
        return policy.name
    return str(getattr(policy, "name_or_path", "") if isinstance(policy, nn.Module) else policy)


def _judge(judge: Any, max_length: int | None) -> PairwiseJudge:
    if isinstance(judge, str):
        return make_pairwise(judge, max_length)
    name = getattr(judge, "name", None)
    if isinstance(name, str) and callable(getattr(judge, "prefer", None)):
        _check_call("judge", judge.prefer, ("prompts", "first", "second"), "judge-name")
        chosen: PairwiseJudge = judge
        return chosen
    if isinstance(name, str) and callable(getattr(judge, "score", None)):
        _check_call("judge", judge.score, ("prompts", "completions"), "judge-name")
        return ByScore(judge)
    raise ConfigError(f"judge: found {judge!r}, expected a name, or an object that judges", code="judge-name")


def _check_call(name: str, method: Any, taken: tuple[str, ...], code: str) -> None:
    """Check that a method of an object of the caller's takes these arguments, before anything is sampled.

    Raises:
        ConfigError: it takes others, or it is a method of a class that was given in place of an object.
    """
    try:
        inspect.signature(method).bind(*taken)
    except TypeError as error:
        called = f"{getattr(method, '__qualname__', method)}({', '.join(taken)})"
        raise ConfigError(
            f"{name}: {called} cannot be called: {error}",
            code=code,
            hint="see docs/python.md; give an object, no class",
        ) from None
    except ValueError:
        return  # a method of C without a signature


def _written(
    policy: Policy,
    loaded: Any,
    prompts: list[Any],
    sampling: Sampling,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Written:
    """One completion of each prompt; a repeated prompt has other random numbers each time."""
    if loaded is None:
        return write_completions(policy, prompts, sampling, folder)
    groups = (
        loaded.generate(prompts, sampling, leaves_out=True)
        if isinstance(loaded, Engine)
        else _sampled(policy, loaded, prompts, sampling, tokenizer)
    )
    table = completions_table(prompts, groups)
    return Written(policy, prompts, sampling, table, digest([policy.name, table["text"][:]]))


def _sampled(
    policy: Policy, loaded: Any, prompts: list[Any], sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None
) -> list[list[Completion]]:
    """Completions of a loaded model, which stays in its mode."""
    from align.generation.transformers_engine import TransformersEngine

    with _training_mode_kept(loaded):
        engine = TransformersEngine(loaded, _padded(tokenizer, loaded, policy.name), batch_size=sampling.batch_size)
        return engine.generate(prompts, sampling, leaves_out=True)


@contextmanager
def _training_mode_kept(model: nn.Module) -> Any:
    training = model.training
    try:
        yield
    finally:
        model.train(training)


def _padded(tokenizer: PreTrainedTokenizerBase | None, model: Any, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a loaded model with a token for padding.

    Raises:
        ModelError: none is given, and the model does not say where it was loaded from.
    """
    if tokenizer is None:
        source = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
        if not source:
            raise ModelError(
                f"{name}: found a loaded model that does not say where it comes from, expected its tokenizer",
                code="model-tokenizer",
                hint="give tokenizer=...",
            )
        return load_tokenizer(str(source))
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
