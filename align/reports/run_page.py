"""Page of a run, report.html from report.json: no request, every text escaped, one script (the search) by its hash."""

from pathlib import Path
from typing import Any

from align.io.files import read_json, write_text
from align.reports import plots, training_section
from align.reports.html import environment, search_script
from align.reports.verdict import verdict
from align.stats import ends

SECTIONS = ("summary", "data", "reward_model", "trust", "margins", "filter", "training", "evaluation", "samples")
RELIABLE = ("heldout", "heldout_calibrated", "in_sample", "out_of_fold")


def write_report(run: Path) -> Path:
    """Render ``run/report.json`` to ``run/report.html`` and return the path of the page."""
    target = run / "report.html"
    write_text(target, render_run_page(read_json(run / "report.json")))
    return target


def render_run_page(report: dict[str, Any]) -> str:
    """The page as text; a section that the report lacks is one line that says so."""
    sections = dict.fromkeys(SECTIONS) | report
    template = environment().get_template("report.html.j2")
    found = {"verdict": verdict(report), "plots": _plots(report), "color": plots.color}
    return template.render(report=sections, **found, **search_script())


def _plots(report: dict[str, Any]) -> dict[str, Any]:
    """Every plot that the report has numbers for, by name."""
    made: dict[str, Any] = {}
    model = report.get("reward_model")
    if model:
        made["margins"] = plots.histogram(
            {key.replace("_", "-"): values for key, values in model["margins"].items()}, x_title="reward margin m"
        )
        bins = {key.replace("_", "-"): model[key]["bins"] for key in RELIABLE if key in model}
        made["reliability"] = plots.reliability(bins)
    margins = report.get("margins")
    if margins:
        made["policy_margins"] = plots.histogram({"margins": margins["values"]}, x_title="reward margin m")
        if margins["weights"]:
            made["weights"] = plots.weight_curve(margins["values"], margins["weights"])
    if report.get("trust"):
        made["trust"] = plots.trust_over_settings(report["trust"]["grid"])
    if "training" in report:
        methods = report["training"]["methods"]
        made["curves"] = training_section.curves(methods)
        made["samples"] = training_section.sample_curves(methods)
        made["judged"] = training_section.judged(methods)
        made["kept"] = training_section.kept_rows(methods)
        made["costs"] = training_section.costs(methods)
        made["entanglement"] = _entanglement(methods)
    if "evaluation" in report:
        policies = report["evaluation"]["policies"]
        made["frontier"] = plots.intervals(
            {key: policy_mark(policy) for key, policy in policies.items() if policy["kl"] or key == "reference"},
            x_title="KL to the reference (nats per completion)",
            y_title="judge's reward",
        )
    return made


def policy_mark(policy: dict[str, Any]) -> tuple[float, tuple[float, float, float]]:
    """KL of a policy, 0 for the reference, and its reward with its interval, as ``plots.intervals`` takes them."""
    return (policy["kl"]["value"] if policy["kl"] else 0.0, ends(policy["reward"]))


def _entanglement(methods: dict[str, Any]) -> list[tuple[str, Any]]:
    """Curves of the probe pairs; none if they were not measured."""
    measured = {name: found["entanglement"] for name, found in methods.items() if found.get("entanglement")}

    def series(keys: dict[str, str]) -> dict[str, tuple[list[float], list[float]]]:
        return {
            f"{name}{label}": ([r["step"] for r in records], [r[key] for r in records])
            for key, label in keys.items()
            for name, records in measured.items()
            if all(key in r for r in records)
        }

    if not measured:
        return []
    both = {"predicted_chosen": " predicted", "realised_chosen": " observed"}
    titles: list[tuple[str, dict[str, str], str]] = [
        ("entangled probe pairs", {"entangled": ""}, "share"),
        ("entangled pairs of the batch", {"batch_entangled": ""}, "share"),
        ("cosine of the two gradients (median)", {"cosine": ""}, "cosine"),
        ("length of the rejected gradient (median)", {"norm_ratio": ""}, "|gl| / |gw|"),
        ("change of log p(chosen) of the probes by one step", both, "nats"),
        ("chosen responses of the batch of a step that the step lowered", {"batch_fell": ""}, "share"),
    ]
    return [
        (title, plots.lines(found, x_title="optimizer step", y_title=y, share=y == "share"))
        for title, keys, y in titles
        if (found := series(keys))
    ]
