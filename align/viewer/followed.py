"""A run as far as it is: stages, curves, the end of its log; read from its folder again and again, never written."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.io.stage import MANIFEST, PARTIAL

REPORT, HISTORY, STATE, LOG = "report.html", "history.json", "trainer_state.json", "log.txt"
TRAIN = "train-"
LOG_BYTES, LOG_LINES = 16_000, 40
MOST_POINTS = 2_000
MOST_CURVES = 80
DEEPEST = 3
NOT_CURVES = frozenset({"step", "epoch"})


def follow(folder: Path) -> dict[str, Any]:
    """State of a run as JSON values; what is missing, or half written at this moment, is left out."""
    stages = sorted(_stages(folder), key=lambda stage: stage["at"])
    methods = {}
    for stage in stages:
        if stage["name"].startswith(TRAIN):
            inner = folder / (stage["name"] + ("" if stage["finished"] else PARTIAL))
            methods[stage["name"].removeprefix(TRAIN)] = _training(inner)
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
    """Curves of one training: metric -> [step, value] of each logged step, with its progress if it goes on."""
    found: dict[str, Any] = {"curves": {}, "step": None, "of": None, "seconds_left": None}
    history = _read(folder / HISTORY).get("history")
    if not isinstance(history, list):
        checkpoints = sorted(folder.glob(f"checkpoints/checkpoint-*/{STATE}"), key=_step)
        state = _read(checkpoints[-1]) if checkpoints else {}
        history = state.get("log_history")
        found |= {"step": state.get("global_step"), "of": state.get("max_steps")}
        found["seconds_left"] = _seconds_left(checkpoints, found["of"])
    curves: dict[str, list[list[float]]] = {}
    for row in history if isinstance(history, list) else ():
        _take(curves, row, row.get("step") if isinstance(row, dict) else None)
    for file in sorted(folder.glob("held-out/step-*.json"), key=_step):
        record = _read(file)
        _take(curves, record.get("pairs"), record.get("step"), "held-out ")
        _take(curves, record.get("samples"), record.get("step"), "samples ")
    found["curves"] = {name: _thinned(points) for name, points in list(curves.items())[:MOST_CURVES]}
    return found


def _seconds_left(checkpoints: list[Path], last: Any) -> float | None:
    """Seconds until the last step at the pace between the first and the newest checkpoint; None if it is unknown."""
    if len(checkpoints) < 2 or not isinstance(last, int):
        return None
    try:
        first, newest = (file.stat().st_mtime for file in (checkpoints[0], checkpoints[-1]))
    except OSError:
        return None
    steps = _step(checkpoints[-1]) - _step(checkpoints[0])
    return (newest - first) / steps * max(0, last - _step(checkpoints[-1])) if steps > 0 else None


def _take(curves: dict[str, list[list[float]]], values: Any, step: Any, prefix: str = "") -> None:
    """Add every number of a record to the curve of its name; of an estimate, its value."""
    if not isinstance(step, int | float) or isinstance(step, bool):
        return
    for name, value in _numbers(values, DEEPEST):
        if name not in NOT_CURVES:
            curves.setdefault(prefix + name, []).append([step, value])


def _numbers(values: Any, depth: int, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, int | float) and not isinstance(values, bool):
        if math.isfinite(values):
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


def _log_end(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - LOG_BYTES))
            return stream.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
    except OSError:
        return []
