"""Page of several runs, from their report.json files: one file, without script or request, with every text escaped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.config import EvaluateSection
from align.config.base import Section
from align.config.judging import JudgeSection
from align.config.leaves import leaves
from align.io.files import write_text
from align.reports import plots
from align.reports.html import environment
from align.reports.run_page import policy_mark
from align.reports.verdict import name

MISSING = "not set"
WITHOUT_EFFECT = frozenset({"judge", "batch_size", "engine", "options", "samples_shown"})
"""Keys of ``evaluate`` on which no reward of its main judge depends but by rounding, or that stand in the table."""
OF_THE_SERVER = frozenset({"name", "truth", "base_url", "concurrency", "attempts"})
"""Keys of a judge on which no reward depends."""
UNTOLD = frozenset({"name", "output_dir"})
"""Keys in which runs differ by their nature."""


def write_runs_page(target: Path, reports: Mapping[str, dict[str, Any]]) -> None:
    """Render the page of ``reports``, name of the run -> its report.json, to ``target``."""
    write_text(target, render_runs_page(reports))


def render_runs_page(reports: Mapping[str, dict[str, Any]]) -> str:
    """The page as text. Rewards stand in one table only where judge, prompts and decoding are equal."""
    groups = [
        {"judged_by": dict(key), "rows": _rows(members), "plot": _plot(members)}
        for key, members in _evaluated_alike(reports).items()
    ]
    return (
        environment()
        .get_template("runs.html.j2")
        .render(
            reports=reports,
            groups=groups,
            unevaluated=[run for run, report in reports.items() if not report.get("evaluation")],
            differences=differences({run: report["run"]["config"] for run, report in reports.items()}),
            models={run: report["reward_model"] for run, report in reports.items() if report.get("reward_model")},
            seconds={run: sum(report["run"]["seconds_per_stage"].values()) for run, report in reports.items()},
        )
    )


def differences(configs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The keys of run files whose values are not the same in all of them.

    Args:
        configs: run -> its whole configuration.

    Returns:
        ``key`` (dotted) and ``values`` (run -> value, ``not set`` where it has none), sorted by key.
    """
    flat = {run: dict(leaves(config)) for run, config in configs.items()}
    keys = sorted({key for values in flat.values() for key in values} - UNTOLD)
    found = []
    for key in keys:
        values = {run: own.get(key, MISSING) for run, own in flat.items()}
        if len({repr(value) for value in values.values()}) > 1:
            found.append({"key": key, "values": values})
    return found


def _evaluated_alike(
    reports: Mapping[str, dict[str, Any]],
) -> dict[tuple[tuple[str, Any], ...], dict[str, dict[str, Any]]]:
    """What rewards depend on beside the policy -> the runs that have it in common."""
    found: dict[tuple[tuple[str, Any], ...], dict[str, dict[str, Any]]] = {}
    for run, report in reports.items():
        evaluation = report.get("evaluation")
        if not evaluation:
            continue
        asked = report["run"]["config"].get("evaluate") or {}
        made_from = evaluation.get("made_from") or {}
        key = {
            "judge": evaluation["judge"],
            "number of prompts": evaluation["n_prompts"],
            "base model": (report["run"]["config"].get("train") or {}).get("model"),
            "content of the prompts": made_from.get("prompts"),
            "content of the judge": made_from.get("judge"),
            **_changed(asked, EvaluateSection, WITHOUT_EFFECT),
            **_changed(_judge(asked, evaluation["judge"]), JudgeSection, OF_THE_SERVER),
        }
        found.setdefault(tuple(key.items()), {})[run] = report
    return found


def _changed(given: Mapping[str, Any], section: type[Section], without: frozenset[str]) -> dict[str, str]:
    """The keys of a section that do not have their defaults, as text, which older versions may not have known."""
    defaults = {key: field.get_default(call_default_factory=True) for key, field in section.model_fields.items()}
    return {
        key: str(value) for key, value in sorted(given.items()) if key not in without and value != defaults.get(key)
    }


def _judge(asked: Mapping[str, Any], judge: str) -> Mapping[str, Any]:
    """The section of a judge in a run file, empty where it is only named."""
    judges = asked.get("judge") or []
    sections = [one for one in (judges if isinstance(judges, list) else [judges]) if isinstance(one, Mapping)]
    return next((one for one in sections if one.get("name") == judge), {})


def _rows(reports: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per policy of each run; references with equal numbers stand once."""
    rows: list[dict[str, Any]] = []
    for run, report in reports.items():
        seconds = report["run"]["seconds_per_stage"]
        for policy, numbers in report["evaluation"]["policies"].items():
            if policy == "reference" and any(row["numbers"] == numbers for row in rows):
                continue
            rows.append(
                {"run": run, "policy": policy, "numbers": numbers, "seconds": seconds.get(f"train-{policy}")},
            )
    return rows


def _plot(reports: Mapping[str, dict[str, Any]]) -> Any:
    """Reward against KL of all policies, in the colors of their runs."""
    marks, groups = {}, {}
    for row in _rows(reports):
        if row["numbers"]["kl"] or row["policy"] == "reference":
            series = f"{row['run']}: {name(row['policy'])}"
            marks[series] = policy_mark(row["numbers"])
            groups[series] = (row["run"], name(row["policy"]))
    titles = {"x_title": "KL to the reference (nats per completion)", "y_title": "judge's reward"}
    return plots.intervals(marks, groups=groups, **titles)
