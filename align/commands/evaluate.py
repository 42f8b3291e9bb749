"""The work of `align eval reward` and `frontier`: each adds its part to OUTPUT/report.json and its page."""

from collections.abc import Sequence
from typing import Any

from align.commands.evaluation_job import Settings, draw_for, finish, how_made, start, write_one, written_by
from align.commands.evaluation_report import publish
from align.commands.evaluation_tables import kl_of, on_same_prompts, samples_of, score
from align.evaluation.compare_policies import PolicySamples, compare_policies, kl_statistics, prompt_ids
from align.evaluation.policies import REFERENCE, Policy, checkpoints, find_reference, parse_policies
from align.io.console import log
from align.stats import interval, mean_interval
from reward_models.pairwise_judges import make_score_judge


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
    started = start(settings, everyone)
    drawn = draw_for(settings, everyone)
    judge = make_score_judge(settings.judge, settings.max_length, settings.options, settings.base_url)
    written, left_out = written_by(everyone, drawn.prompts, settings)
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
        "run": how_made(settings, everyone, drawn, started, left_out),
        "samples": samples_of(written, rewards, settings.shown),
    }
    publish(settings.output, {"reward": section}, section)
    for name, numbers in found.policies.items():
        gain = f", gain {interval(numbers['gain'])}" if numbers["gain"] else ""
        distance = f", KL {interval(numbers['kl'])} nats" if numbers["kl"] else ""
        log.info("%s: reward %s%s%s", name, interval(numbers["reward"]), gain, distance)
    finish(settings.output)


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
    started = start(settings, [origin, *policies, *parse_policies(trained)])
    drawn = draw_for(settings, [origin, *policies, *(policy for _, policy in steps)])
    judge = make_score_judge(settings.judge, settings.max_length, settings.options, settings.base_url)
    jobs: list[tuple[Policy, float, int | None]] = [(origin, 1.0, None)]
    heats = list(dict.fromkeys(temperatures))
    jobs += [(policy, heat, None) for policy in (origin, *policies) for heat in heats if policy != origin or heat != 1]
    jobs += [(policy, 1.0, step) for step, policy in steps]
    base: PolicySamples | None = None
    points = []
    everything = [write_one(policy, drawn.prompts, settings, heat) for policy, heat, _ in jobs]
    everything, left_out = on_same_prompts(everything)
    for (policy, heat, step), written in zip(jobs, everything, strict=True):
        kl = kl_of(written, origin, settings.output, settings.cluster)
        rewards = score(written, judge, settings.output, settings.max_length)
        samples = PolicySamples(rewards, kl, as_it_is=written.sampling.as_it_is).by_prompt(prompt_ids(written.prompts))
        base = samples if base is None else base
        named = {"policy": policy.name, "temperature": heat, "step": step}
        points.append(named | _point(samples, base))
    section = {"points": points, "run": how_made(settings, [origin, *policies], drawn, started, left_out)}
    publish(settings.output, {"frontier": section}, section)
    finish(settings.output)


def _point(samples: PolicySamples, base: PolicySamples) -> dict[str, Any]:
    """Reward, gain over the first point, KL and gain per sqrt(2 KL) of one point of the frontier."""
    assert samples.rewards is not None and base.rewards is not None
    return {
        "reward": mean_interval(samples.rewards).to_dict(),
        "gain": mean_interval(samples.rewards - base.rewards).to_dict(),
    } | kl_statistics(samples, base)
