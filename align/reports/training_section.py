"""The training section of a run's page: curves of the steps and of held-out pairs, the kept step, samples over time."""

from collections.abc import Callable, Mapping
from typing import Any

from align.reports import plots
from align.stats import ends, interval

CURVES = {
    "loss": ("loss", False),
    "rewards/margins": ("implicit reward margin, beta h", True),
    "rewards/accuracies": ("share of pairs ranked as labeled", False),
    "weight/ess_share": ("effective sample size / batch", False),
}
HELD_OUT = "held out"
"""Ending of the name of a curve over held-out pairs, which is dashed."""
OF_SAMPLES = {
    "win_rate": ("win rate against the start, by the judge", "win rate"),
    "reward": ("judge's reward", "reward"),
    "kl": ("exact KL to the reference", "nats per response"),
    "tokens": ("tokens per sample", "tokens"),
    "unfinished": ("samples cut off by the token limit", "share"),
    "repetition": ("trigrams that repeat an earlier one", "share"),
}
"""Metric of the samples -> title of its plot, and of its vertical axis."""
ROWS = {
    "pairs": {"loss": "held-out loss", "rewards/accuracies": "held-out accuracy",
              "kl": "KL along held-out responses (nats per response)"},
    "samples": {"win_rate": "win rate against the start", "gain": "gain by the judge",
                "gain_per_root_kl": "gain / sqrt(2 KL)", "kl": "KL of its samples (nats per response)"},
}  # fmt: skip
Points = tuple[list[float], list[float]]


def curves(methods: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Title and plot of everything that was logged in the steps, with held-out pairs in the same plot."""
    made = []
    changes = _both_sides(methods, _of_steps)
    if changes:
        made.append(("change of log-prob since the start", _lines(changes, "nats", zero=True)))
    for key, (title, zero) in CURVES.items():
        found = _of_steps(methods, key) | {
            f"{name} {HELD_OUT}": points for name, points in _of_pairs(methods, key).items()
        }
        if found:
            made.append((title, _lines(found, title, zero=zero)))
    held_out = _both_sides(methods, _of_pairs)
    if held_out:
        title = "change of log-prob since the start, held-out pairs"
        made.append((title, _lines(held_out, "nats", zero=True)))
    kl = _of_pairs(methods, "kl")
    if kl:
        made.append(("exact KL to the reference along held-out responses", _lines(kl, "nats per response", zero=True)))
    return made


def sample_curves(methods: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Title and plot, with intervals over prompts, of everything that was measured on samples."""
    made = []
    for key, (title, unit) in OF_SAMPLES.items():
        series = {}
        for name, found in _watched(methods).items():
            steps = [(one["step"], one["samples"]["all"].get(key)) for one in found["steps"] if "samples" in one]
            points = [(float(step), ends(estimate)) for step, estimate in steps if estimate is not None]
            if points:
                series[name] = points
        if series:
            made.append((title, plots.interval_lines(series, x_title="optimizer step", y_title=unit)))
    return made


def judged(methods: Mapping[str, Any]) -> str:
    """A sentence on how many prompts were sampled for, and who judged the samples."""
    found = [one["samples"] for held_out in _watched(methods).values() for one in held_out["steps"] if "samples" in one]
    if not found:
        return ""
    name = found[0]["judge"]
    judge = f"judge: {name}" if name else "no judge: the run has no section `evaluate`"
    return f"{found[0]['samples']} samples for {found[0]['prompts']} held-out prompts in each step; {judge}."


def kept_rows(methods: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each method that chose a step: which, why, and its numbers on the prompts that chose it and that did not."""
    made = []
    for name, found in _watched(methods).items():
        kept = found.get("kept")
        if kept is None:
            continue
        halves = {part: kept.get(part, {}) for part in ("choosing", "reporting")}
        rows = [
            (title, *(_shown(halves[part].get(kind, {}).get(key)) for part in halves))
            for kind, titles in ROWS.items()
            for key, title in titles.items()
            if key in halves["reporting"].get(kind, {})
        ]
        made.append({"method": name, "rows": rows} | {key: kept[key] for key in ("step", "last", "why", "rule")})
    return made


def costs(methods: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the evaluations of each method cost: seconds, tokens, and their share of the seconds of its stage."""
    made = []
    for name, found in _watched(methods).items():
        pairs = [one["cost"] for one in found["steps"] if "cost" in one]
        samples = [one["samples"] for one in found["steps"] if "samples" in one]
        seconds = [sum(one["seconds"] for one in part) for part in (pairs, samples)]
        total = methods[name]["seconds"]
        made.append(
            {
                "method": name,
                "evaluations": len(pairs),
                "samplings": len(samples),
                "seconds": seconds,
                "tokens": [sum(one["tokens"] for one in part) for part in (pairs, samples)],
                "share": sum(seconds) / total if total else None,
                "early": found.get("early_stopping"),
            }
        )
    return made


def _shown(estimate: Mapping[str, Any] | None) -> str:
    return "not defined" if estimate is None else interval(estimate)


def _watched(methods: Mapping[str, Any]) -> dict[str, Any]:
    return {name: training["held_out"] for name, training in methods.items() if training.get("held_out")}


def _of_steps(methods: Mapping[str, Any], key: str) -> dict[str, Points]:
    return {
        method: (
            [entry["step"] for entry in training["history"] if key in entry],
            [float(entry[key]) for entry in training["history"] if key in entry],
        )
        for method, training in methods.items()
        if any(key in entry for entry in training["history"])
    }


def _of_pairs(methods: Mapping[str, Any], key: str) -> dict[str, Points]:
    """Return the curve of each method over all held-out pairs, whether they choose or report."""
    found = {}
    for name, held_out in _watched(methods).items():
        points = [(one["step"], one["pairs"]["all"][key]["value"]) for one in held_out["steps"] if _has(one, key)]
        if points:
            found[name] = ([step for step, _ in points], [value for _, value in points])
    return found


def _has(record: Mapping[str, Any], key: str) -> bool:
    return key in record.get("pairs", {}).get("all", {})


def _both_sides(
    methods: Mapping[str, Any], series: Callable[[Mapping[str, Any], str], dict[str, Points]]
) -> dict[str, Points]:
    return {
        f"{method} {side}": points
        for side in ("chosen", "rejected")
        for method, points in series(methods, f"logps/{side}_change").items()
    }


def _lines(series: dict[str, Points], y_title: str, *, zero: bool) -> Any:
    return plots.lines(series, x_title="optimizer step", y_title=y_title, zero=zero)
