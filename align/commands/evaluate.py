"""What `align eval reward`, `compare` and `frontier` do. Each adds its part to OUTPUT/report.json and its page."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from align.commands.evaluation_tables import (
    COMPLETIONS,
    Decoding,
    Written,
    judge_pairs,
    measure_kl,
    read_prompts,
    score,
    write_completions,
)
from align.errors import ConfigError, DataError
from align.evaluation.policies import REFERENCE, Policy, checkpoints, find_reference, parse_policies
from align.evaluation.rewards import gain_per_root_kl, reward_differences
from align.evaluation.text_statistics import Texts, changed, text_statistics
from align.evaluation.winrate import win_rate
from align.io.console import log, out
from align.io.files import read_json, write_json
from align.io.stage import check_files
from align.stats import bootstrap_mean, interval
from reward_models.loading import DEFAULTS, LoadOptions
from reward_models.pairwise_judges import ByScore, make_pairwise, make_score_judge

REPORT = "report.json"
PAGE = "report.html"
PARTS = frozenset({"reward", "comparisons", "frontier"})
"""Of an evaluation's report."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What every evaluation of policies shares."""

    prompts: str
    output: Path
    judge: str
    decoding: Decoding
    limit: int | None
    """Prompts to use; None: all of them."""
    shown: int
    """Prompts whose completions are shown on the page."""
    max_length: int | None = None
    """Tokens that a reward model or an ``llm:`` judge reads; None: 1024."""
    options: LoadOptions = DEFAULTS
    """How a reward model that judges is loaded and reads texts."""


def reward(items: Sequence[str], reference: str | None, settings: Settings) -> None:
    """Gold reward of policies on held-out prompts, gains over the reference, KL, gain per sqrt(2 KL), texts.

    Args:
        items: policies, ``NAME=FOLDER`` or ``FOLDER``.
        reference: what gains and KL are counted from; None: what the policies' adapters were trained on.
        settings: prompts, judge, decoding.

    Raises:
        AlignError: a policy, the prompts or the judge cannot be used.
    """
    policies = parse_policies(items)
    origin = find_reference(policies, reference)
    started = _start(settings, [origin, *policies])
    prompts = read_prompts(settings.prompts, settings.limit)
    judge = make_score_judge(settings.judge, settings.max_length, settings.options)
    written = {
        policy.name: write_completions(policy, prompts, settings.decoding, settings.output)
        for policy in (origin, *policies)
    }
    kls = {name: _kl(found, origin, settings.output) for name, found in written.items()}
    rewards = {name: score(found, judge, settings.output, settings.max_length) for name, found in written.items()}
    seed = settings.decoding.seed
    section = reward_differences(rewards, baseline=REFERENCE, seed=seed)
    texts = text_statistics({n: _texts(w) for n, w in written.items()}, baseline=REFERENCE, seed=seed)
    for name, values in section["policies"].items():
        kl = kls[name]
        ratio = None
        if kl is not None and settings.decoding.temperature == 1:  # else gain and KL are counted from two origins
            ratio = gain_per_root_kl(rewards[name] - rewards[REFERENCE], kl, seed=seed)
        values["kl"] = None if kl is None else bootstrap_mean(kl, seed=seed).to_dict()
        values["gain_per_root_kl"] = ratio and ratio.to_dict()
        values["texts"] = texts[name]
    section |= {"changed": changed(texts), "run": _run(settings, [origin, *policies], len(prompts), started)}
    section["samples"] = _samples(written, rewards, settings.shown)
    _publish(settings.output, {"reward": section})
    out.print_json(json.dumps({key: value for key, value in section.items() if key != "samples"}))
    for name, values in section["policies"].items():
        gain = f", gain {interval(values['gain'])}" if values["gain"] else ""
        kl_said = f", KL {interval(values['kl'])} nats" if values["kl"] else ""
        log.info("%s: reward %s%s%s", name, interval(values["reward"]), gain, kl_said)
    _finish(settings.output)


def write_comparison(first: str, second: str, settings: Settings) -> None:
    """Head-to-head win rate of two policies under a judge that is asked in both orders.

    Args:
        first: policy A, ``NAME=FOLDER`` or ``FOLDER``.
        second: policy B.
        settings: prompts, judge, decoding.

    Raises:
        AlignError: a policy, the prompts or the judge cannot be used.
    """
    a, b = parse_policies([first, second])
    started = _start(settings, [a, b])
    prompts = read_prompts(settings.prompts, settings.limit)
    judge = make_pairwise(settings.judge, settings.max_length, settings.options)
    ours, theirs = (write_completions(policy, prompts, settings.decoding, settings.output) for policy in (a, b))
    shown_first, shown_second = judge_pairs(ours, theirs, judge, settings.output, settings.max_length)
    lengths = ([len(text) for text in written.table["text"]] for written in (ours, theirs))
    seed = settings.decoding.seed
    result = win_rate(shown_first, shown_second, *lengths, seed=seed)
    written = {a.name: ours, b.name: theirs}
    texts = text_statistics({n: _texts(w) for n, w in written.items()}, baseline=b.name, seed=seed)
    outcome = (shown_first + shown_second) / 2
    samples = _samples(written, {}, settings.shown)
    for sample, value in zip(samples, outcome, strict=False):
        sample["preference"] = float(value)
    section = {
        "a": a.name,
        "b": b.name,
        "judge": judge.name,
        "both_orders": not isinstance(judge, ByScore),
        "win_rate": result.to_dict(),
        "texts": texts,
        "changed": changed(texts),
        "run": _run(settings, [a, b], len(prompts), started),
        "samples": samples,
    }
    _publish(settings.output, {"comparisons": {f"{a.name} against {b.name}, {judge.name}": section}})
    out.print_json(json.dumps({key: value for key, value in section.items() if key != "samples"}))
    controlled = section["win_rate"]["length_controlled"]  # type: ignore[index]
    said = f"; at equal lengths {interval(controlled['rate'])}" if controlled else "; lengths cannot be told apart"
    log.info("%s wins %s against %s%s", a.name, interval(result.rate.to_dict()), b.name, said)
    _finish(settings.output)


def frontier(
    items: Sequence[str],
    reference: str | None,
    temperatures: Sequence[float],
    trained: Sequence[str],
    settings: Settings,
) -> None:
    """Gold reward against KL to the reference, over decoding temperatures and over training checkpoints.

    Args:
        items: policies, decoded at every temperature.
        reference: as in ``reward``; decoded at every temperature too.
        temperatures: of the decoding; the reference of rewards and KL is always at temperature 1.
        trained: ``NAME=FOLDER`` of folders with ``checkpoint-<step>``; each is decoded at temperature 1.
        settings: prompts, judge, decoding.

    Raises:
        AlignError: a policy, the prompts or the judge cannot be used.
    """
    policies = parse_policies(items)
    steps = [(step, policy) for folder in parse_policies(trained) for step, policy in checkpoints(folder)]
    origin = find_reference([*policies, *(policy for _, policy in steps)], reference)
    started = _start(settings, [origin, *policies, *parse_policies(trained)])
    prompts = read_prompts(settings.prompts, settings.limit)
    judge = make_score_judge(settings.judge, settings.max_length, settings.options)
    jobs: list[tuple[Policy, float, int | None]] = [(origin, 1.0, None)]
    heats = list(dict.fromkeys(temperatures))
    jobs += [(policy, heat, None) for policy in (origin, *policies) for heat in heats if policy != origin or heat != 1]
    jobs += [(policy, 1.0, step) for step, policy in steps]
    base = None
    points = []
    for policy, heat, step in jobs:
        decoding = replace(settings.decoding, temperature=heat)
        written = write_completions(policy, prompts, decoding, settings.output)
        kl = _kl(written, origin, settings.output)
        rewards = score(written, judge, settings.output, settings.max_length)
        base = rewards if base is None else base
        points.append(_point(policy.name, heat, step, rewards, base, kl, settings.decoding.seed))
    section = {"points": points, "run": _run(settings, [origin, *policies], len(prompts), started)}
    _publish(settings.output, {"frontier": section})
    out.print_json(json.dumps(section))
    _finish(settings.output)


def page(output: Path) -> None:
    """Render OUTPUT/report.html from OUTPUT/report.json again.

    Raises:
        DataError: there is no report.json.
    """
    from jinja2 import TemplateError

    from align.reports.comparison_page import write_comparison_page

    if not (output / REPORT).exists():
        raise DataError(
            f"{output}: holds no {REPORT}",
            code="report-missing",
            hint="run `align eval reward` or `compare` first",
        )
    report = _read_report(output)
    try:
        write_comparison_page(output / PAGE, report)
    except (LookupError, TypeError, AttributeError, TemplateError) as error:
        raise _no_report(output, " ".join(str(error).split())) from None
    log.info("look at it: open %s", output / PAGE)


def _point(
    name: str,
    temperature: float,
    step: int | None,
    rewards: np.ndarray,
    base: np.ndarray,
    kl: np.ndarray | None,
    seed: int,
) -> dict[str, Any]:
    ratio = None if kl is None else gain_per_root_kl(rewards - base, kl, seed=seed)
    return {
        "policy": name,
        "temperature": temperature,
        "step": step,
        "reward": bootstrap_mean(rewards, seed=seed).to_dict(),
        "gain": bootstrap_mean(rewards - base, seed=seed).to_dict(),
        "kl": None if kl is None else bootstrap_mean(kl, seed=seed).to_dict(),
        "gain_per_root_kl": ratio and ratio.to_dict(),
    }


def _kl(written: Written, origin: Policy, output: Path) -> np.ndarray | None:
    """None for the reference at temperature 1, which is at no distance from itself."""
    if written.policy.model == origin.model and written.decoding.temperature == 1:
        return None
    return measure_kl(written, origin, output)


def _texts(written: Written) -> Texts:
    tokens = [len(ids) for ids in written.table["token_ids"]]
    return Texts(written.table["text"], tokens, written.table["finished"])


def _samples(written: dict[str, Written], rewards: dict[str, np.ndarray], shown: int) -> list[dict[str, Any]]:
    """The first prompts with what every policy wrote."""
    prompts = next(iter(written.values())).prompts
    texts = {name: found.table["text"] for name, found in written.items()}
    return [
        {
            "prompt": prompts[k],
            "completions": {
                name: {"text": text[k], "reward": float(rewards[name][k]) if name in rewards else None}
                for name, text in texts.items()
            },
        }
        for k in range(min(shown, len(prompts)))
    ]


def _run(settings: Settings, policies: Sequence[Policy], prompts: int, started: float) -> dict[str, Any]:
    """How a part of the report was made."""
    return {
        "command": shlex.join(["align", *sys.argv[1:]]),
        "prompts": str(settings.prompts),
        "n_prompts": prompts,
        "judge": settings.judge,
        "policies": {policy.name: policy.model for policy in policies},
        "decoding": {name: value for name, value in asdict(settings.decoding).items() if name != "cluster"},
        "seconds": round(time.monotonic() - started, 1),
    }


def _start(settings: Settings, policies: Sequence[Policy]) -> float:
    """Say what will be done, look whether it can be written; the time.

    Raises:
        ConfigError: the output is a file, or holds a report or a page of something else.
        DataError: a report.json lies there that is none.
    """
    if settings.output.is_file():
        raise ConfigError(
            f"{settings.output}: found a file, expected a folder", code="output-folder", hint="give another --output"
        )
    check_files(settings.output, [PAGE], own=[REPORT, COMPLETIONS])
    if (settings.output / REPORT).exists() and not _read_report(settings.output).keys() <= PARTS:
        raise ConfigError(
            f"{settings.output / REPORT}: found another report, expected none or that of an evaluation",
            code="output-folder",
            hint="give another --output",
        )
    named = ", ".join(f"{policy.name} ({policy.model})" for policy in policies)
    log.info("evaluating %s on %s, judge %s -> %s", named, settings.prompts, settings.judge, settings.output)
    return time.monotonic()


def _publish(output: Path, part: dict[str, Any]) -> None:
    """Put a part into the report, beside what other commands left there, and render the page."""
    from align.reports.comparison_page import write_comparison_page

    file = output / REPORT
    report = _read_report(output) if file.exists() else {}
    if "comparisons" in part:
        part = {"comparisons": report.get("comparisons", {}) | part["comparisons"]}
    write_json(file, report | part)
    write_comparison_page(output / PAGE, report | part)


def _read_report(output: Path) -> dict[str, Any]:
    """OUTPUT/report.json.

    Raises:
        DataError: it is not JSON, or no object.
    """
    try:
        report = read_json(output / REPORT)
    except ValueError as error:
        raise _no_report(output, str(error)) from None
    if not isinstance(report, dict):
        raise _no_report(output, f"found a {type(report).__name__}")
    return report


def _no_report(output: Path, why: str) -> DataError:
    return DataError(
        f"{output / REPORT}: not the report of an evaluation ({why})",
        code="report-missing",
        hint="give another --output, or delete the file and evaluate again: completions and scores are kept",
    )


def _finish(output: Path) -> None:
    log.info("numbers: %s; look at it: open %s", output / REPORT, output / PAGE)
