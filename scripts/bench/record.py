"""Kept results of the benchmarks: what was measured, on which machine, when, at which commit, and what became slower.

A benchmark names its numbers as measures, each a list with a value per round, of which less is better. The rounds show
the noise: a measure has become worse if Welch's t-test of the logarithms of both runs' rounds says so at ``LEVEL`` and
the medians differ by more than ``LEAST``. Seconds are divided by the time of a fixed piece of work of the same run, so
that a machine that is slower for a while does not count; ratios to another program of the same round are taken as they
are.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import ttest_ind

LEVEL = 0.01
"""Probability of calling a measure worse that is not, one-sided, per measure."""
LEAST = 0.03
"""Relative differences below this are not reported, however certain."""
YARDSTICK_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Measure:
    """Values of one number, one per round; less is better."""

    values: Sequence[float]
    unit: Literal["s", "ratio", "MiB"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with their median."""
        return {"unit": self.unit, "median": statistics.median(self.values), "values": list(self.values)}


def add_keep(parser: argparse.ArgumentParser) -> None:
    """Add ``--keep``, the folder of kept results."""
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="compare with the result kept there, and replace it"
    )


def finish(
    name: str, found: Mapping[str, Any], measures: Mapping[str, Measure], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Print a benchmark's result as JSON; with ``--keep`` say what became slower, and keep the result.

    Args:
        name: name of the benchmark, and of its file.
        found: whatever else it found.
        measures: name -> its rounds.
        arguments: the command's; only results of the same arguments are compared.
    """
    settings = {key: _plain(value) for key, value in sorted(vars(arguments).items()) if key != "keep"}
    record: dict[str, Any] = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "settings": settings,
        "yardstick": yardstick(),
        "measures": {key: measure.to_dict() for key, measure in measures.items()},
        "found": dict(found),
    }
    print(json.dumps(record, indent=2))
    if arguments.keep is not None:
        file = arguments.keep / f"{name}.json"
        for line in compared(json.loads(file.read_text(encoding="utf-8")) if file.exists() else None, record):
            print(f"{name}: {line}", file=sys.stderr)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def compared(old: dict[str, Any] | None, new: dict[str, Any]) -> list[str]:
    """Sentences on what ``new`` has made slower or larger than ``old``, or why the two cannot be compared."""
    if old is None:
        return ["the first result, nothing to compare with"]
    for part in ("machine", "settings"):
        if old[part] != new[part]:
            return [f"not compared: the kept result has other {part}, {_difference(old[part], new[part])}"]
    lines, alone = [], 0
    for name, measure in new["measures"].items():
        before = old["measures"].get(name)
        if before is None or before["unit"] != measure["unit"]:
            continue
        if min(len(before["values"]), len(measure["values"])) < 2:
            alone += 1
            continue
        change, probability = _change(_logs(old, before), _logs(new, measure))
        if change > LEAST and probability < LEVEL:
            unit = {"s": "slower", "ratio": "slower against the other program", "MiB": "larger"}[measure["unit"]]
            lines.append(f"{name} is {change:.0%} {unit} than at {old['commit'][:10]} (p = {probability:.1g})")
    if alone:
        lines.append(f"{alone} measures have a single round, whose noise is unknown: not compared")
    return lines or [f"nothing slower than at {old['commit'][:10]} by more than its noise"]


def _logs(record: dict[str, Any], measure: dict[str, Any]) -> np.ndarray:
    scale = statistics.median(record["yardstick"]) if measure["unit"] == "s" else 1.0
    return np.log(np.maximum(measure["values"], 1e-9)) - math.log(scale)


def _change(old: np.ndarray, new: np.ndarray) -> tuple[float, float]:
    """Relative change of the median, and the probability of rounds this much worse if nothing has changed."""
    change = math.exp(float(np.median(new) - np.median(old))) - 1
    if max(np.ptp(old), np.ptp(new)) == 0:  # numbers without noise, such as a count of passes
        return change, 0.0 if change > 0 else 1.0
    return change, float(ttest_ind(new, old, equal_var=False, alternative="greater").pvalue)


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}: {old.get(key)} and not {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)
    )


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the program."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The processor's name, family, model and widest instructions for products of matrices."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    first = info.read_text(encoding="utf-8").split("\n\n")[0]
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    name = fields.get("model name", platform.machine())
    return f"{name}, family {fields.get('cpu family')}, model {fields.get('model')}, {' '.join(wide)}"


def commit() -> str:
    """The commit of this checkout; "-changed" after it if files that git knows are not as in it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        line = ["git", *arguments]
        done = subprocess.run(line, cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/align", ":/reward_models", ":/scripts")
    return (git("rev-parse", "HEAD") or "unknown") + ("-changed" if changed else "")


def yardstick() -> list[float]:
    """CPU seconds of a fixed piece of work, a round each: products of matrices and copies in memory."""
    torch.manual_seed(0)
    a, b = torch.randn(1024, 1024), torch.randn(32 * 2**20 // 4)
    taken = []
    for _ in range(YARDSTICK_ROUNDS + 1):
        start = time.process_time()
        for _ in range(8):
            torch.mm(a, a)
            b.mul(1.5).add_(1.0)
        taken.append(time.process_time() - start)
    return taken[1:]
