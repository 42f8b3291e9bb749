"""The work of `align eval compare`: two or more policies under a judge that is asked in both orders."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from align.commands.evaluation_job import Settings, draw_for, finish, how_made, start, written_by
from align.commands.evaluation_report import publish
from align.commands.evaluation_tables import Written, comparing_judge, judge_pairs, samples_of
from align.errors import ConfigError
from align.evaluation.compare_policies import (
    PolicySamples,
    by_prompt,
    compare_policies,
    identical_texts,
    prompt_ids,
)
from align.evaluation.policies import parse_policies
from align.evaluation.win_table import win_table
from align.io.console import log
from align.stats import interval
from reward_models.pairwise_judges import ByScore, PairwiseJudge


def write_comparisons(items: Sequence[str], settings: Settings) -> None:
    """Measure the win rate of every two of K policies under a judge that is asked in both orders.

    Args:
        items: K >= 2 policies, ``NAME=FOLDER`` or ``FOLDER``. With more than two, each is also measured against all
            others together, see ``win_table``.
        settings: prompts, judge, sampling.

    Raises:
        AlignError: a policy, the prompts or the judge cannot be used.
    """
    policies = parse_policies(items)
    if len(policies) < 2:
        raise ConfigError(
            f"POLICY: found {len(policies)}, expected two or more to compare",
            code="eval-policy",
            hint="give the base model too, as base=MODEL",
        )
    started = start(settings, policies)
    drawn = draw_for(settings, policies)
    judge = comparing_judge(settings.judge, settings.output, settings.max_length, settings.options, settings.base_url)
    written, left_out = written_by(policies, drawn.prompts, settings)
    clusters = prompt_ids(next(iter(written.values())).prompts)
    sections: dict[str, dict[str, Any]] = {}
    verdicts: dict[tuple[str, str], np.ndarray] = {}
    for a, b in combinations(policies, 2):
        preferences = judge_pairs(written[a.name], written[b.name], judge, settings.output, settings.max_length)
        run = how_made(settings, [a, b], drawn, started, left_out)
        two = {name: written[name] for name in (a.name, b.name)}
        section = compare_written(two, judge, preferences, shown=settings.shown, run=run)
        sections[f"{a.name} against {b.name}, {judge.name}"] = section
        verdicts[a.name, b.name] = by_prompt(np.stack(preferences), clusters).mean(axis=0)
        log.info("%s", win_sentence(section))
    found: dict[str, Any] = {"comparisons": sections}
    printed = next(iter(sections.values()))
    if len(policies) > 2:
        table = win_table(verdicts)
        found["win_tables"] = {judge.name: table}
        printed = {
            "judge": judge.name,
            "win_table": table,
            "run": how_made(settings, policies, drawn, started, left_out),
        }
        for row in table:
            log.info("%s: preferred to the others %s", row["policy"], interval(row["rate"]))
    publish(settings.output, found, printed)
    finish(settings.output)


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
