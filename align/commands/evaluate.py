"""The work of `align eval reward`, `compare` and `frontier`: each adds its part to OUTPUT/report.json and its page."""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from align.commands.evaluation_report import PAGE, REPORT, check_report_folder, publish
from align.commands.evaluation_tables import (
    Written,
    comparing_judge,
    judge_pairs,
    kl_of,
    on_same_prompts,
    samples_of,
    score,
    write_completions,
)
from align.config import ClusterSection
from align.data.prompts import draw_prompts
from align.errors import ConfigError
from align.evaluation.compare_policies import (
    PolicySamples,
    compare_policies,
    identical_texts,
    kl_statistics,
    prompt_ids,
)
from align.evaluation.policies import REFERENCE, Policy, checkpoints, find_reference, parse_policies
from align.generation.types import Sampling
from align.io.console import log
from align.stats import interval, mean_interval
from reward_models.loading import DEFAULTS, LoadOptions
from reward_models.pairwise_judges import ByScore, PairwiseJudge, make_score_judge


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings that every evaluation of policies shares.

    Raises:
        ConfigError: the engine is a server.
    """

    prompts: str
    output: Path
    judge: str
    sampling: Sampling
    """With n = 1."""
    limit: int | None
    """Number of prompts to use; None: all of them."""
    shown: int
    """Number of prompts whose completions are shown on the page."""
    max_length: int | None = None
    """Tokens that a reward model or an ``llm:`` judge reads; None: 1024."""
    cluster: ClusterSection | None = None
    """The cluster whose workers share the prompts; no result depends on it."""
    options: LoadOptions = DEFAULTS
    """How a reward model that judges is loaded and reads texts."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template for all prompts; those of a row come first."""
    base_url: str | None = None
    """Address of a ``server:`` judge."""

    def __post_init__(self) -> None:
        if self.sampling.engine == "server":
            raise ConfigError(
                "--engine server: found a server, expected auto, vllm or transformers",
                code="engine-option",
                hint="policies are read from their folders here, because KL and checkpoints need their weights",
            )


def reward(items: Sequence[str], reference: str | None, settings: Settings) -> None:
    """Measure rewards of policies on held-out prompts, gains over the reference, KL, gain per sqrt(2 KL), texts.

    Args:
        items: policies, ``NAME=FOLDER`` or ``FOLDER``.
        reference: what gains and KL are counted from; None: the model that the policies' adapters were trained on.
        settings: prompts, judge, sampling.

    Raises:
        AlignError: a policy, the prompts or the judge cannot be used.
    """
    policies = parse_policies(items)
    origin = find_reference(policies, reference)
    everyone = [origin, *policies]
    started = _start(settings, everyone)
    drawn = _prompts(settings, everyone)
    judge = make_score_judge(settings.judge, settings.max_length, settings.options)
    written, left_out = _written(everyone, drawn.prompts, settings)
    kl = {name: kl_of(found, origin, settings.output, settings.cluster) for name, found in written.items()}
    rewards = {name: score(found, judge, settings.output, settings.max_length) for name, found in written.items()}
    samples = {
        name: PolicySamples(rewards[name], kl[name], found.texts(), settings.sampling.as_it_is)
        for name, found in written.items()
    }
    found = compare_policies(samples, baseline=REFERENCE, clusters=prompt_ids(written[REFERENCE].prompts))
    section = {
        "policies": {name: numbers | {"texts": found.texts[name]} for name, numbers in found.policies.items()},
        "comparisons": found.differences,
        "changed": found.changes,
        "run": _run(settings, everyone, drawn, started, left_out),
        "samples": samples_of(written, rewards, settings.shown),
    }
    publish(settings.output, {"reward": section}, section)
    for name, numbers in found.policies.items():
        gain = f", gain {interval(numbers['gain'])}" if numbers["gain"] else ""
        distance = f", KL {interval(numbers['kl'])} nats" if numbers["kl"] else ""
        log.info("%s: reward %s%s%s", name, interval(numbers["reward"]), gain, distance)
    _finish(settings.output)


def write_comparison(first: str, second: str, settings: Settings) -> None:
    """Measure the win rate of policy A over policy B under a judge that is asked in both orders.

    Args:
        first: policy A, ``NAME=FOLDER`` or ``FOLDER``.
        second: policy B.
        settings: prompts, judge, sampling.

    Raises:
        AlignError: a policy, the prompts or the judge cannot be used.
    """
    a, b = parse_policies([first, second])
    started = _start(settings, [a, b])
    drawn = _prompts(settings, [a, b])
    judge = comparing_judge(settings.judge, settings.output, settings.max_length, settings.options, settings.base_url)
    written, left_out = _written([a, b], drawn.prompts, settings)
    preferences = judge_pairs(written[a.name], written[b.name], judge, settings.output, settings.max_length)
    run = _run(settings, [a, b], drawn, started, left_out)
    section = compare_written(written, judge, preferences, shown=settings.shown, run=run)
    publish(settings.output, {"comparisons": {f"{a.name} against {b.name}, {judge.name}": section}}, section)
    log.info("%s", win_sentence(section))
    _finish(settings.output)


def compare_written(
    written: Mapping[str, Written],
    judge: PairwiseJudge,
    preferences: tuple[np.ndarray, np.ndarray],
    *,
    shown: int,
    run: dict[str, Any],
) -> dict[str, Any]:
    """The section of a report on policy A against policy B.

    Args:
        written: completions of A and of B for the same N prompts, in this order.
        judge: the judge that was asked.
        preferences: for A when it is shown first and when it is shown second, [N] each, in [0, 1].
        shown: number of prompts whose completions are part of the section.
        run: how it was made, see ``_run``.
    """
    a, b = written
    texts = {name: PolicySamples(texts=found.texts()) for name, found in written.items()}
    clusters = prompt_ids(next(iter(written.values())).prompts)
    found = compare_policies(texts, baseline=b, preferences=preferences, clusters=clusters)
    assert found.win_rate is not None
    samples = samples_of(written, {}, shown)
    for sample, value in zip(samples, (preferences[0] + preferences[1]) / 2, strict=False):
        sample["preference"] = float(value)
    return {
        "a": a,
        "b": b,
        "judge": judge.name,
        "both_orders": not isinstance(judge, ByScore),
        "cost": getattr(judge, "cost", None),
        "identical_texts": identical_texts({name: found.table["text"][:] for name, found in written.items()}),
        "win_rate": found.win_rate.to_dict(),
        "texts": found.texts,
        "changed": found.changes,
        "run": run,
        "samples": samples,
    }


def win_sentence(section: Mapping[str, Any]) -> str:
    """The win rate of a section of ``compare_written`` with its interval, plain and at equal lengths."""
    found = section["win_rate"]
    controlled = found["length_controlled"]
    equal = "lengths cannot be controlled for"
    if controlled is not None:
        equal = f"at equal lengths {interval(controlled['rate'])}"
    return f"{section['a']} wins {interval(found['rate'])} against {section['b']}; {equal}"


def frontier(
    items: Sequence[str],
    reference: str | None,
    temperatures: Sequence[float],
    trained: Sequence[str],
    settings: Settings,
) -> None:
    """Measure reward against KL to the reference, over sampling temperatures and over training checkpoints.

    Args:
        items: policies, sampled at every temperature.
        reference: as in ``reward``; sampled at every temperature too.
        temperatures: sampling temperatures; gains and KL are counted from the reference at temperature 1.
        trained: ``NAME=FOLDER`` of folders with ``checkpoint-<step>``; each is sampled at temperature 1.
        settings: prompts, judge, sampling.

    Raises:
        AlignError: a policy, the prompts or the judge cannot be used.
    """
    policies = parse_policies(items)
    steps = [(step, policy) for folder in parse_policies(trained) for step, policy in checkpoints(folder)]
    origin = find_reference([*policies, *(policy for _, policy in steps)], reference)
    started = _start(settings, [origin, *policies, *parse_policies(trained)])
    drawn = _prompts(settings, [origin, *policies, *(policy for _, policy in steps)])
    judge = make_score_judge(settings.judge, settings.max_length, settings.options)
    jobs: list[tuple[Policy, float, int | None]] = [(origin, 1.0, None)]
    heats = list(dict.fromkeys(temperatures))
    jobs += [(policy, heat, None) for policy in (origin, *policies) for heat in heats if policy != origin or heat != 1]
    jobs += [(policy, 1.0, step) for step, policy in steps]
    base: PolicySamples | None = None
    points = []
    everything = [_write(policy, drawn.prompts, settings, heat) for policy, heat, _ in jobs]
    everything, left_out = on_same_prompts(everything)
    for (policy, heat, step), written in zip(jobs, everything, strict=True):
        kl = kl_of(written, origin, settings.output, settings.cluster)
        rewards = score(written, judge, settings.output, settings.max_length)
        samples = PolicySamples(rewards, kl, as_it_is=written.sampling.as_it_is).by_prompt(prompt_ids(written.prompts))
        base = samples if base is None else base
        named = {"policy": policy.name, "temperature": heat, "step": step}
        points.append(named | _point(samples, base))
    section = {"points": points, "run": _run(settings, [origin, *policies], drawn, started, left_out)}
    publish(settings.output, {"frontier": section}, section)
    _finish(settings.output)


def _point(samples: PolicySamples, base: PolicySamples) -> dict[str, Any]:
    """Reward, gain over the first point, KL and gain per sqrt(2 KL) of one point of the frontier."""
    assert samples.rewards is not None and base.rewards is not None
    return {
        "reward": mean_interval(samples.rewards).to_dict(),
        "gain": mean_interval(samples.rewards - base.rewards).to_dict(),
    } | kl_statistics(samples, base)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The prompts of an evaluation, and how many its source has."""

    prompts: list[Any]
    of: int


def _prompts(settings: Settings, policies: Sequence[Policy]) -> Drawn:
    """The prompts, once the chat templates of the policies and of a judge that is a model folder take them.

    Raises:
        ModelError, DataError: the prompts or a template cannot be used.
    """
    from align.models import message_checks, template_arguments

    prompts, total = draw_prompts(settings.prompts, settings.limit, settings.chat_template_kwargs)
    models = dict.fromkeys(policy.model for policy in policies)
    message_checks.check_prompts_of(prompts, models)
    for model in models:
        template_arguments.report_other_arguments(prompts, model)
    if Path(settings.judge).is_dir():
        options = {"trust_remote_code": settings.options.trust_remote_code, "text_pair": settings.options.text_pair}
        message_checks.check_prompts_of(prompts, [settings.judge], answered=True, **options)
    return Drawn(prompts, total)


def _write(policy: Policy, prompts: Sequence[Any], settings: Settings, temperature: float | None = None) -> Written:
    """The completions of a policy, at the temperature of the settings by default."""
    sampling = settings.sampling if temperature is None else replace(settings.sampling, temperature=temperature)
    return write_completions(policy, prompts, sampling, settings.output, settings.cluster)


def _written(
    policies: Sequence[Policy], prompts: Sequence[Any], settings: Settings
) -> tuple[dict[str, Written], dict[str, Any]]:
    """Name -> completions of the prompts that every policy completed, and what is left out."""
    kept, left_out = on_same_prompts([_write(policy, prompts, settings) for policy in policies])
    return {one.policy.name: one for one in kept}, left_out


def _run(
    settings: Settings, policies: Sequence[Policy], drawn: Drawn, started: float, left_out: Mapping[str, Any]
) -> dict[str, Any]:
    """Command, settings and duration of a part of the report."""
    sampling = settings.sampling
    return {
        "command": shlex.join(["align", *sys.argv[1:]]),
        "prompts": str(settings.prompts),
        "n_prompts": len(drawn.prompts) - left_out.get("count", 0),
        **({"left_out": dict(left_out)} if left_out else {}),
        "of_prompts": drawn.of,
        "judge": settings.judge,
        "policies": {policy.name: policy.model for policy in policies},
        "decoding": {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "batch_size": sampling.batch_size,
            "engine": sampling.engine,
            "chat_template_kwargs": dict(settings.chat_template_kwargs),
        },
        "seconds": round(time.monotonic() - started, 1),
    }


def _start(settings: Settings, policies: Sequence[Policy]) -> float:
    """Log what is evaluated and check that the output can be written; return the start time.

    Raises:
        ConfigError: the output is a file, or holds a report or a page of something else.
        DataError: its report.json is not a report.
    """
    check_report_folder(settings.output)
    named = ", ".join(f"{policy.name} ({policy.model})" for policy in policies)
    log.info("evaluating %s on %s, judge %s -> %s", named, settings.prompts, settings.judge, settings.output)
    return time.monotonic()


def _finish(output: Path) -> None:
    log.info("numbers: %s; look at it: open %s", output / REPORT, output / PAGE)
