"""`align doctor`: what this machine is, what is installed, and a short self-test; text for a bug report."""

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from packaging.requirements import Requirement
from packaging.version import Version

from align.io.shipped import shipped

DISTRIBUTION = "margin-align"
TESTED = "constraints.txt"
SETTINGS = (
    "ACCELERATE_USE_FSDP", "CUDA_VISIBLE_DEVICES", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE",
    "HTTPS_PROXY", "HTTP_PROXY", "LD_PRELOAD", "MKL_NUM_THREADS", "NO_PROXY", "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF", "RANK", "TRANSFORMERS_OFFLINE", "WORLD_SIZE",
)  # fmt: skip
"""Environment variables that change what a run does. None is a secret; a login within an address is removed."""
HUB = "https://huggingface.co"
GIB = 2**30
NEEDED_DISK = 5.0
"""GiB: a small model, its reference and two checkpoints."""


def examine(*, self_test: bool = True, network: bool = False) -> dict[str, Any]:
    """Everything that `align doctor` shows.

    Args:
        self_test: also run the four checks of ``align.commands.self_test``, which take about ten seconds.
        network: also ask the hub for one page; nothing is asked for otherwise.

    Returns:
        ``machine``, ``packages``, ``extras``, ``settings``, ``checks`` (each with name, ok, found, expected) and
        ``problems``, the names of the checks that failed.
    """
    machine = _machine()
    packages, extras = _packages()
    checks = [*_requirements(packages), *_space()]
    if network:
        checks.append(_hub())
    if self_test:
        from align.commands.self_test import self_test as run_checks

        checks += run_checks(machine["device"], machine["dtype"])
    return {
        "machine": machine,
        "packages": packages,
        "extras": extras,
        "settings": {name: _without_login(os.environ[name]) for name in SETTINGS if os.environ.get(name)},
        "checks": checks,
        "problems": [check["name"] for check in checks if not check["ok"]],
    }


def as_text(found: dict[str, Any]) -> str:
    """The same as lines to read, and to paste into a bug report."""
    machine = found["machine"]
    lines = [f"{name}: {value}" for name, value in machine.items()]
    lines += ["", "packages (installed; tested with)"]
    for name, one in found["packages"].items():
        installed = one["installed"] or "missing"
        same = one["tested"] in (None, installed.partition("+")[0])
        lines.append(f"  {name} {installed}" + ("" if same else f"; {one['tested']}"))
    lines += ["", "optional"]
    for name, one in found["extras"].items():
        state = ", ".join(one["installed"]) if one["complete"] else f"not installed: {one['install']}"
        lines.append(f"  {name}: {state}")
    if found["settings"]:
        lines += ["", "settings", *(f"  {name}={value}" for name, value in found["settings"].items())]
    lines += ["", "checks"]
    for check in found["checks"]:
        mark = "ok  " if check["ok"] else "FAIL"
        lines.append(f"  {mark} {check['name']}: found {check['found']}, expected {check['expected']}")
    return "\n".join(lines)


def _machine() -> dict[str, Any]:
    import torch

    gpus = [
        f"{torch.cuda.get_device_name(k)}, {torch.cuda.get_device_properties(k).total_memory / GIB:.0f} GiB"
        for k in range(torch.cuda.device_count())
    ]
    mps = torch.backends.mps.is_available()
    device = "cuda" if gpus else "mps" if mps else "cpu"
    half = device == "cuda" and torch.cuda.is_bf16_supported()
    memory = psutil.virtual_memory()
    return {
        "align": _version(DISTRIBUTION) or "not installed",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device,
        "gpus": gpus,
        "cuda": torch.version.cuda or "none",
        "dtype": "bfloat16" if half else "float32",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
    }


def _packages() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Required packages with the installed and the tested version, and the optional groups with their install line."""
    tested = dict(
        line.split("#")[0].strip().lower().split("==")
        for line in shipped(TESTED).read_text(encoding="utf-8").splitlines()
        if "==" in line.split("#")[0]
    )
    required: dict[str, dict[str, Any]] = {}
    groups: dict[str, list[str]] = {}
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        needed = Requirement(line)
        extra = str(needed.marker).partition("extra == ")[2].strip("\"'") if needed.marker else ""
        if extra:
            groups.setdefault(extra, []).append(needed.name)
            continue
        required[needed.name] = {
            "installed": _version(needed.name),
            "tested": tested.get(needed.name.lower()),
            "wanted": str(needed.specifier) or "any",
        }
    extras = {}
    for extra, names in groups.items():
        if extra in ("dev", "mutation"):
            continue
        there = [f"{name} {version}" for name in names if (version := _version(name))]
        install = f"pip install '{DISTRIBUTION}[{extra}]'"
        extras[extra] = {"installed": there, "complete": len(there) == len(names), "install": install}
    return required, extras


def _requirements(packages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One check for Python and one for all required packages."""
    wrong = [
        f"{name} {one['installed'] or 'missing'}, wanted {one['wanted']}"
        for name, one in packages.items()
        if one["installed"] is None or not _fits(one)
    ]
    enough = sys.version_info >= (3, 11)
    return [
        {"name": "Python", "ok": enough, "found": platform.python_version(), "expected": "3.11 or newer"},
        {
            "name": "required packages",
            "ok": not wrong,
            "found": "; ".join(wrong) or f"{len(packages)} in range",
            "expected": "versions in the range that pyproject.toml gives",
        },
    ]


def _fits(one: dict[str, Any]) -> bool:
    needed = Requirement(f"x{'' if one['wanted'] == 'any' else one['wanted']}")
    return needed.specifier.contains(Version(one["installed"]), prereleases=True)


def _space() -> list[dict[str, Any]]:
    """Free disk here and where the hub's files are kept."""
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    found = []
    for what, folder in (("disk here", Path.cwd()), ("disk of the model cache", cache)):
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free / GIB
        found.append(
            {
                "name": what,
                "ok": free >= NEEDED_DISK,
                "found": f"{free:.0f} GiB free at {there}",
                "expected": f"at least {NEEDED_DISK:.0f} GiB",
            }
        )
    return found


def _hub() -> dict[str, Any]:
    """Whether the hub answers, through the proxies that are set."""
    import httpx

    address = os.environ.get("HF_ENDPOINT", HUB)
    try:
        answer = httpx.head(address, timeout=10, follow_redirects=True)
        found, ok = f"{_without_login(address)} answers {answer.status_code}", answer.status_code < 500
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        found, ok = f"{_without_login(address)}: {type(error).__name__}", False
    return {"name": "the hub", "ok": ok, "found": found, "expected": "an answer"}


def _without_login(value: str) -> str:
    """An address without user and password; any other value as it is."""
    parts = urlsplit(value)
    if "@" not in parts.netloc:
        return value
    return parts._replace(netloc=f"***@{parts.netloc.rpartition('@')[2]}").geturl()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
