"""A run as far as it is: stages, curves, the end of its log; read from its folder again and again, never written."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.io.stage import MANIFEST, PARTIAL

REPORT, HISTORY, STATE, LOG = "report.html", "history.json", "trainer_state.json", "log.txt"
LIVE, PROBES = "live.jsonl", "entanglement.json"
TRAIN, REWARD = "train-", "reward"
GROUPS = (
    ("Loss", ("loss", "held-out all loss", "eval_loss")),
    ("Rewards of samples", ("samples all reward", "samples all gain")),
    ("Win rate of samples", ("samples all win_rate",)),
    ("Margins", ("rewards/margins", "held-out all rewards/margins")),
    ("Accuracy", ("rewards/accuracies", "held-out all rewards/accuracies", "accuracy")),
    ("Log-probs against the reference", ("logps/chosen_change", "logps/rejected_change")),
    (
        "Held-out log-probs against the reference",
        ("held-out all logps/chosen_change", "held-out all logps/rejected_change"),
    ),
    ("Entanglement", ("entanglement entangled", "entanglement batch_entangled", "entanglement cosine")),
    ("KL of samples", ("samples all kl",)),
    ("Length of samples", ("samples all tokens",)),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("learning_rate",)),
)
"""(title, curves) that belong into one chart, the most important first."""
LOG_BYTES, LOG_LINES = 16_000, 40
MOST_POINTS = 2_000
MOST_CURVES = 200
PACE = 50
PROBED = "entanglement"
DEEPEST = 3
SILENCE, LONGER = 300, 10
"""A training is silent after so many seconds, and so many times the time between two of its lines."""
NOT_CURVES = frozenset({"step", "epoch", "of", "at"})


def follow(folder: Path) -> dict[str, Any]:
    """State of a run as JSON values; what is missing, or half written at this moment, is left out."""
    stages = sorted(_stages(folder), key=lambda stage: stage["at"])
    methods = {}
    for stage in stages:
        inner = folder / (stage["name"] + ("" if stage["finished"] else PARTIAL))
        if stage["name"].startswith(TRAIN):
            methods[stage["name"].removeprefix(TRAIN)] = _training(inner)
        elif stage["name"] == REWARD and not stage["finished"]:
            methods["reward model"] = _training(inner)
    return {
        "name": folder.name,
        "folder": str(folder),
        "stages": stages,
        "methods": methods,
        "log": _log_end(folder / LOG),
        "report": report_file(folder) is not None,
    }


def report_file(folder: Path) -> Path | None:
    """The report of a finished run; None if there is none yet."""
    file = folder / REPORT
    return file if file.is_file() else None


def _stages(folder: Path) -> Iterator[dict[str, Any]]:
    for child in folder.iterdir() if folder.is_dir() else ():
        try:
            if not child.is_dir():
                continue
            if child.name.endswith(PARTIAL):
                yield {"name": child.name.removesuffix(PARTIAL), "finished": False, "at": child.stat().st_mtime}
            elif (child / MANIFEST).is_file():
                seconds = _read(child / MANIFEST).get("seconds")
                at = (child / MANIFEST).stat().st_mtime
                yield {"name": child.name, "finished": True, "at": at, "seconds": seconds}
        except OSError:
            continue


def _training(folder: Path) -> dict[str, Any]:
    """Curves of one training: metric -> [step, value] of each logged step, with its progress if it goes on.

    ``bands`` has the 95% intervals of the measured ones: metric -> [step, low, high]. ``groups`` says which curves
    belong into one chart.
    """
    found: dict[str, Any] = {"step": None, "of": None, "seconds_left": None, "silent": None}
    finished = _read(folder / HISTORY)
    rows = finished.get("history")
    if not isinstance(rows, list):
        rows = _live(folder / LIVE)
        checkpoints = sorted(folder.glob(f"checkpoints/checkpoint-*/{STATE}"), key=_step)
        if not rows and checkpoints:
            state = _read(checkpoints[-1])
            logged = state.get("log_history")
            rows = logged if isinstance(logged, list) else []
            found |= {"step": state.get("global_step"), "of": state.get("max_steps")}
        if rows and "of" in rows[-1]:
            found |= {"step": rows[-1]["step"], "of": rows[-1]["of"], "seconds_left": _seconds_left(rows)}
            found["silent"] = _silent(folder / LIVE, rows)
    curves, bands = _Curves(), _Curves()
    for row in rows:
        if isinstance(row, dict):
            curves.take({key: value for key, value in row.items() if key not in NOT_CURVES}, row.get("step"))
    for file in sorted(folder.glob("held-out/step-*.json"), key=_step):
        record = _read(file)
        for part, name in (("pairs", "held-out"), ("samples", "samples")):
            own = record.get(part)
            whole = {"all": own["all"]} if isinstance(own, dict) and "all" in own else own
            curves.take(whole, record.get("step"), f"{name} ")
            bands.take_ends(whole, record.get("step"), f"{name} ")
    probes = finished.get("entanglement") or _read_list(folder / PROBES)
    for record in probes if isinstance(probes, list) else ():
        if isinstance(record, dict):
            curves.take(
                {key: value for key, value in record.items() if key != "step"}, record.get("step"), f"{PROBED} "
            )
    found["curves"], found["bands"] = curves.thinned(), bands.thinned()
    return found | {"groups": _groups(found["curves"])}


def _groups(curves: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The charts of ``GROUPS`` that have a curve, then one for each of the other curves."""
    found = [{"title": title, "curves": [name for name in names if name in curves]} for title, names in GROUPS]
    used = {name for group in found for name in group["curves"]}
    rest = [{"title": name, "curves": [name]} for name in curves if name not in used]
    return [group for group in found if group["curves"]] + rest


def _live(file: Path) -> list[dict[str, Any]]:
    """The lines of a training that goes on; a resumed one takes back the steps that it does again."""
    rows: list[dict[str, Any]] = []
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and all(_is_number(row.get(name)) for name in ("step", "of", "at")):
            while rows and (rows[-1]["step"] > row["step"] or _is_repeated(rows[-1], row)):
                rows.pop()
            rows.append(row)
    return rows


def _is_repeated(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> bool:
    """Whether a line logs the same of the same step again; a training and its evaluation log different numbers."""
    return earlier["step"] == later["step"] and bool((earlier.keys() & later.keys()) - NOT_CURVES)


def _seconds_left(rows: list[dict[str, Any]]) -> float | None:
    """Seconds until the last step at the pace of the last ``PACE`` logged steps; None if it is unknown."""
    first, last = rows[-PACE:][0], rows[-1]
    steps, seconds = last["step"] - first["step"], last["at"] - first["at"]
    return max(0.0, seconds / steps * (last["of"] - last["step"])) if steps > 0 and seconds > 0 else None


def _silent(file: Path, rows: list[dict[str, Any]]) -> int | None:
    """Whole minutes since a training logged last, where that is much longer than between its lines; else None."""
    try:
        quiet = time.time() - file.stat().st_mtime
    except OSError:
        return None
    recent = rows[-PACE:]
    between = (recent[-1]["at"] - recent[0]["at"]) / max(1, len(recent) - 1)
    return int(quiet / 60) if quiet > max(SILENCE, LONGER * between) else None


class _Curves:
    """Points of curves by their names, in order of their steps."""

    def __init__(self) -> None:
        self.points: dict[str, list[list[float]]] = {}

    def take(self, values: Any, step: Any, prefix: str = "") -> None:
        """Add every number of a record to the curve of its name; of an estimate, its value."""
        if _is_number(step):
            for name, value in _numbers(values, DEEPEST):
                self.points.setdefault(prefix + name, []).append([step, value])

    def take_ends(self, values: Any, step: Any, prefix: str, depth: int = DEEPEST) -> None:
        """Add the ends of the interval of every estimate of a record."""
        if not isinstance(values, Mapping) or not _is_number(step):
            return
        if "value" in values:
            low, high = values.get("low"), values.get("high")
            if low is not None and high is not None and _is_number(low) and _is_number(high):
                self.points.setdefault(prefix.strip(), []).append([step, low, high])
        elif depth:
            for key, inner in values.items():
                self.take_ends(inner, step, f"{prefix}{key} ", depth - 1)

    def thinned(self) -> dict[str, list[list[float]]]:
        """The first ``MOST_CURVES`` curves, each of at most ``MOST_POINTS`` points."""
        return {name: _thinned(points) for name, points in list(self.points.items())[:MOST_CURVES]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(values: Any, depth: int, name: str = "") -> Iterator[tuple[str, float]]:
    if _is_number(values):
        yield name, float(values)
    elif isinstance(values, Mapping) and "value" in values:
        yield from _numbers(values["value"], 0, name)
    elif isinstance(values, Mapping) and depth:
        for key, inner in values.items():
            yield from _numbers(inner, depth - 1, f"{name} {key}".strip())


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """At most ``MOST_POINTS`` of the points, evenly, with the last one."""
    every = -(-len(points) // MOST_POINTS)
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def _step(file: Path) -> int:
    name = file.parent.name if file.name == STATE else file.stem
    number = name.rsplit("-", 1)[-1]
    return int(number) if number.isdigit() else -1


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it is missing, half written or anything else."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_list(file: Path) -> list[Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _log_end(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - LOG_BYTES))
            return stream.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
    except OSError:
        return []
