"""Gather the results of a run's stages into one dictionary, report.json; the page shows nothing else."""

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.config import RunConfig
from align.data.pairs import read_pairs
from align.evaluation.while_training import shown_samples
from align.io.files import read_json
from align.io.secrets import redact
from align.io.stage import MANIFEST, versions
from align.losses.margin_weights import MADPO_TAU, madpo_weight, weight_summary
from align.losses.spec import BoundLoss
from align.losses.sums import bind_section
from align.training.held_out_trainer import FOLDER as HELD_OUT
from align.training.held_out_trainer import SAMPLES

DIGITS = 4
PROMPTS_SHOWN = 3
"""Prompts whose samples over a training are shown."""
FILTER_SUMMARY = "filter.json"


def collect(config: RunConfig, *, seconds: dict[str, float], command: str) -> dict[str, Any]:
    """The report of a run as plain JSON values, read from the folders of its stages.

    Args:
        config: the run.
        seconds: stage name -> wall-clock seconds of the run that made it; no other stage's folder is read.
        command: command line that makes the same run again.
    """
    root = config.folder
    report: dict[str, Any] = {
        "run": {
            "name": config.name,
            "command": command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": config.seed,
            "config": redact(config.model_dump()),
            "versions": versions(),
            "fingerprints": {name: read_json(root / name / MANIFEST)["key"][:16] for name in seconds},
            "seconds_per_stage": seconds,
        },
        "data": {"sets": _data(root, seconds)},
    }
    sections = {
        "reward_model": _reward_model(config, root) if "reward" in seconds else None,
        "trust": read_json(root / "trust" / "trust.json") if "trust" in seconds else None,
        "margins": _margins(config, root) if "margins" in seconds else None,
        "filter": read_json(root / "filter" / FILTER_SUMMARY) if "filter" in seconds else None,
        "training": _training(root, seconds),
        "evaluation": read_json(root / "evaluate" / "metrics.json") if "evaluate" in seconds else None,
    }
    report |= {name: section for name, section in sections.items() if section is not None}
    if "evaluation" in report:
        report["samples"] = report["evaluation"].pop("samples")
        if "margins" in report:
            report["margins"]["judge_correlation"] = report["evaluation"]["judge_correlation"]
    report["summary"] = _summary(report)
    return report


def _data(root: Path, stages: Collection[str]) -> list[dict[str, Any]]:
    sets = []
    for stage in ("pairs-reward", "pairs", "sample", "heldout"):
        if stage in stages:
            found = read_json(root / stage / "metrics.json")
            sets += [{"name": f"{stage}: {part}", **found[part]} for part in ("train", "heldout") if part in found]
    return sets


def _reward_model(config: RunConfig, root: Path) -> dict[str, Any]:
    assert config.reward is not None
    section: dict[str, Any] = read_json(root / "reward" / "metrics.json")
    named = [name for name in ("heldout", "in_sample") if name in section]  # one of thumbs alone has no in_sample
    section["margins"] = {name: _column(root / "reward" / name) for name in named}
    if config.reward.folds:
        section["folds"] = config.reward.folds
        section["out_of_fold"] = read_json(root / "crossfit" / "metrics.json")
        section["margins"]["out_of_fold"] = _column(root / "crossfit" / "pairs")
    return section


def _margins(config: RunConfig, root: Path) -> dict[str, Any] | None:
    folder = root / "margins" / "pairs"
    if "margin" not in read_pairs(folder).column_names:
        return None
    values = _column(folder)
    margin = torch.tensor(values, dtype=torch.float64)
    section: dict[str, Any] = {
        "values": values,
        "weights": {},
        "parameters": {},
        "summary": {},
        "warnings": [],
        "tau": MADPO_TAU,
        "note": read_json(root / "margins" / "metrics.json").get("note", ""),
    }
    for method, loss in _weighted(config).items():
        parameters = {name: loss.parameters[name] for name in ("c_max", "c_min", "lam", "tau")}
        weight = madpo_weight(margin, **parameters)
        section["weights"][method] = [round(value, DIGITS) for value in weight.tolist()]
        section["parameters"][method] = parameters
        section["summary"][method] = weight_summary(weight, margin, parameters["tau"])
        section["warnings"] += loss.warnings
        section["tau"] = parameters["tau"]
        assert config.train is not None
        if config.train.methods[method].weights is not None:
            section["warnings"].append(f"{method}: margins and weights are those before its `weights` section.")
        share = section["summary"][method]["ess_share"]
        if share > 0.99:
            section["warnings"].append(
                f"{method}: the weights are nearly equal (effective sample size {share:.1%} of the pairs): "
                "expect it to act like plain DPO."
            )
    return section


def _weighted(config: RunConfig) -> dict[str, BoundLoss]:
    """Methods with a loss that is weighted by the margin, or with such a term, and that loss."""
    methods = config.train.methods if config.train else {}
    weighted = {name: bind_section(loss) for name, loss in methods.items() if "madpo" in loss.names}
    return {name: next(p for p in loss.parts if p.spec.name == "madpo") for name, loss in weighted.items()}


def _training(root: Path, seconds: Mapping[str, float]) -> dict[str, Any] | None:
    methods = {}
    for stage, took in seconds.items():
        kind, _, name = stage.partition("-")
        if kind == "train":
            history = read_json(root / stage / "history.json")
            methods[name] = {"loss": history["loss"], "seconds": took, "history": history["history"]}
            if "held_out" in history:
                methods[name]["held_out"] = history["held_out"]
                methods[name]["over_time"] = shown_samples(root / stage / HELD_OUT / SAMPLES, PROMPTS_SHOWN)
            methods[name] |= {"entanglement": history["entanglement"]} if history.get("entanglement") else {}
    return {"methods": methods} if methods else None


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """The main numbers, for scripts: summary.json."""
    summary: dict[str, Any] = {"seconds_per_stage": report["run"]["seconds_per_stage"]}
    if "reward_model" in report:
        _put(summary, "reward_model_accuracy", report["reward_model"]["heldout"]["accuracy"])
        if "out_of_fold" in report["reward_model"]:
            _put(summary, "reward_model_accuracy_out_of_fold", report["reward_model"]["out_of_fold"]["accuracy"])
    kind = "gold" if report.get("evaluation", {}).get("truth") else "judge"
    if report.get("margins", {}).get("judge_correlation"):
        _put(summary, f"margin_{kind}_correlation", report["margins"]["judge_correlation"])
    policies = report.get("evaluation", {}).get("policies", {})
    for name, policy in policies.items():
        key = "before" if name == "reference" else f"after_{name}"
        _put(summary, f"{kind}_reward_{key}", policy["reward"])
        if name != "reference":
            _put(summary, f"{kind}_gain_{name}", policy["gain"])
            if "reward_model_gain" in policy:
                _put(summary, f"reward_model_gain_{name}", policy["reward_model_gain"])
            for key in ("kl", "gain_per_root_kl"):
                if policy[key] is not None:
                    _put(summary, f"{key}_{name}", policy[key])
    return summary


def _put(summary: dict[str, Any], key: str, estimate: dict[str, float]) -> None:
    summary[key] = estimate["value"]
    summary[f"{key}_ci"] = [estimate["low"], estimate["high"]]


def _column(folder: Path) -> list[float]:
    """The margins of a pair table that are not missing, rounded."""
    margin = np.asarray(read_pairs(folder)["margin"], dtype=np.float64)
    return [round(float(value), DIGITS) for value in margin[~np.isnan(margin)]]
