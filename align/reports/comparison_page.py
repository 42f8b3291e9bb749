"""report.json of `align eval` -> one HTML file: no request, every text escaped, one script (the search) by its hash."""

import json
from pathlib import Path
from typing import Any

from align.data.text import plain
from align.io.files import write_text
from align.reports import plots
from align.reports.benchmark_tables import benchmark_sentences, benchmark_tables
from align.reports.frontier import Mark, frontier
from align.reports.html import environment, percent, search_script
from align.reports.share_bar import shares
from align.reports.verdict import name
from align.stats import ends, excludes, interval


def write_comparison_page(target: Path, report: dict[str, Any]) -> None:
    """Render the page.

    Args:
        target: the file.
        report: ``reward``, ``comparisons``, ``win_tables``, ``frontier`` and ``benchmarks``; each may be missing.
    """
    write_text(target, render_comparison_page(report))


def render_comparison_page(report: dict[str, Any]) -> str:
    """The page as text; a part that was not measured is one line with the command that measures it."""
    empty: dict[str, Any] = {"reward": None, "comparisons": {}, "win_tables": {}, "frontier": None, "benchmarks": None}
    complete = empty | report
    runs = [part["run"] for part in _parts(complete)]
    everyone = runs + ([complete["benchmarks"]["run"]] if complete["benchmarks"] else [])
    names = list(dict.fromkeys(key for run in everyone for key in run["policies"]))
    sentence, details = headline(complete)
    made = environment()
    return made.get_template("comparison.html.j2").render(
        report=complete,
        names=names,
        headline=sentence,
        details=details,
        plots=_plots(complete, names),
        color=plots.color,
        changes=_changes(complete),
        text_tables=_text_tables(complete),
        samples=_samples(complete, names),
        benchmarks=benchmark_tables(complete["benchmarks"]),
        prompts=max((run["n_prompts"] for run in runs), default=0),
        runs=runs,
        **search_script(),
    )


def headline(report: dict[str, Any]) -> tuple[str, list[str]]:
    """The main result in one sentence with its interval, then the other results."""
    sentences = [_preferred(found) for found in report["comparisons"].values()]
    if report["reward"]:
        policies = report["reward"]["policies"]
        sentences = [_gained(key, policy) for key, policy in policies.items() if policy["gain"]] + sentences
    if report.get("benchmarks"):
        sentences += benchmark_sentences(report["benchmarks"])
    if not sentences:
        return ("Reward against KL was measured." if report["frontier"] else "Nothing has been evaluated yet."), []
    return sentences[0], sentences[1:] + _changes(report)


def _gained(key: str, policy: dict[str, Any]) -> str:
    gain = policy["gain"]
    kl = f" at a KL of {interval(policy['kl'])} nats" if policy["kl"] else ""
    if not excludes(gain, 0.0):
        return f"{name(key)}: no difference in reward seen, gain {interval(gain)}{kl}."
    verb = "raised" if gain["value"] > 0 else "lowered"
    return f"{name(key)} {verb} the reward by {interval(gain)}{kl}."


def _preferred(found: dict[str, Any]) -> str:
    a, b, rate = name(found["a"]), name(found["b"]), found["win_rate"]["rate"]
    controlled = found["win_rate"]["length_controlled"]
    equal = f", {percent(controlled['rate'])} at equal lengths" if controlled else ""
    if not excludes(rate, 0.5):
        return f"{a} against {b}: no difference seen, {a} wins {percent(rate)}{equal}; judge {found['judge']}."
    verb = "beats" if rate["value"] > 0.5 else "loses to"
    doubt = ""
    if controlled and not excludes(controlled["rate"], 0.5):
        doubt = ": the difference in length may explain all of it"
    return f"{a} {verb} {b}: {a} wins {percent(rate)}{equal}{doubt}; judge {found['judge']}."


def _parts(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in (report["reward"], *report["comparisons"].values(), report["frontier"]) if part]


def _changes(report: dict[str, Any]) -> list[str]:
    """Changes of the text statistics beyond their intervals, once for each policy and baseline."""
    sentences = []
    for part in (report["reward"], *report["comparisons"].values()):
        base = "reference" if part is report["reward"] else part["b"]
        for item in part["changed"] if part else []:
            share = percent(item["change"]).replace("%", " points")
            shown = interval(item["change"]) if item["what"] == "tokens" else share
            sentences.append(f"{name(item['policy'])} {item['said']} than {name(base)}: {shown}.")
    return list(dict.fromkeys(sentences))


def _text_tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Text statistics, one table for each set of policies."""
    tables = []
    if report["reward"]:
        tables.append({key: policy["texts"] for key, policy in report["reward"]["policies"].items()})
    for found in report["comparisons"].values():
        if not any(set(found["texts"]) <= set(table) for table in tables):
            tables.append(found["texts"])
    return tables


def _samples(report: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Completions of all policies for each prompt, with the verdicts of the judges.

    Two parts of the report share an entry if their texts of the same policy are equal. They differ under
    another decoding, or if two models have the same name; a verdict is shown with the texts that were judged.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for part in _parts(report):
        for sample in part.get("samples", []):
            entries = found.setdefault(json.dumps(sample["prompt"], sort_keys=True), [])
            entry = next((one for one in entries if _same_texts(one["completions"], sample["completions"])), None)
            if entry is None:
                entry = {"prompt": plain(sample["prompt"]), "completions": {}, "verdicts": []}
                entries.append(entry)
            merged = sample["completions"] | entry["completions"]
            entry["completions"] = {key: merged[key] for key in names if key in merged}
            if "preference" in sample:
                entry["verdicts"].append(_verdict(part, sample["preference"]))
    return [entry for entries in found.values() for entry in entries]


def _same_texts(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether the policies in both have equal texts."""
    return all(first[key]["text"] == second[key]["text"] for key in first.keys() & second.keys())


def _verdict(part: dict[str, Any], preference: float) -> str:
    if preference == 0.5:
        return f"{part['judge']}: a tie of {name(part['a'])} and {name(part['b'])}"
    winner, loser = (part["a"], part["b"]) if preference > 0.5 else (part["b"], part["a"])
    return f"{part['judge']}: {name(winner)} before {name(loser)}"


def _plots(report: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Every plot that the report has numbers for; a policy has the same color in all of them."""
    made: dict[str, Any] = {"wins": {}}
    titles: dict[str, Any] = {"x_title": "KL to the reference (nats per completion)", "y_title": "reward"}
    if report["reward"]:
        dots = {key: [_mark(policy, key)] for key, policy in report["reward"]["policies"].items()}
        made["reward"] = frontier(dots, methods=names, **titles)
    for key, found in report["comparisons"].items():
        wins = found["win_rate"]
        made["wins"][key] = shares(
            {
                f"{name(found['a'])} wins": (wins["wins"], plots.color(found["a"], names)),
                "ties": (wins["ties"], "tie"),
                f"{name(found['b'])} wins": (wins["losses"], plots.color(found["b"], names)),
            }
        )
    if report["frontier"]:
        made["frontier"] = frontier(_curves(report["frontier"]["points"]), methods=names, **titles)
    return made


def _curves(points: list[dict[str, Any]]) -> dict[str, list[Mark]]:
    """Marks of each policy by temperature, and of its checkpoints by step, from the reference on."""
    curves: dict[str, list[Mark]] = {}
    start = points[0]
    for policy in dict.fromkeys(point["policy"] for point in points):
        own = [point for point in points if point["policy"] == policy]
        heats = sorted((p for p in own if p["step"] is None), key=lambda p: p["temperature"])
        curves[policy] = [
            _mark(p, f"{policy}, temperature {p['temperature']:g}", f"{p['temperature']:g}") for p in heats
        ]
        steps = sorted((p for p in own if p["step"] is not None), key=lambda p: p["step"])
        if steps:
            last = steps[-1]["step"]
            marks = [
                _mark(p, f"{policy}, step {p['step']}", f"step {p['step']}" if p["step"] == last else str(p["step"]))
                for p in steps
            ]
            curves[f"{policy} checkpoints"] = [_mark(start, "reference, step 0"), *marks]
    return curves


def _mark(point: dict[str, Any], title: str, label: str = "") -> Mark:
    kl = f"KL {interval(point['kl'])}" if point["kl"] else "KL 0"
    hover = f"{title}: {kl}, reward {interval(point['reward'])}"
    return Mark(_kl(point), ends(point["reward"]), hover, label)


def _kl(point: dict[str, Any]) -> float:
    return float(point["kl"]["value"]) if point["kl"] else 0.0
