"""Run everything that only a GPU can show, in one command; write one JSON file and one page.

Both layouts in bfloat16 under every attention kernel, DPO against trl, an adapter on a 4-bit base, DDP and FSDP2 on as
many GPUs as there are, vLLM, and speed and memory next to trl. What this machine cannot run is left out by name. A case
that fails, or that ends its process, does not stop the others. Exit code 1 if one failed. Without a GPU the same cases
run on the CPU at tiny sizes.

    python -m scripts.gpu_check.run --model .assets/smollm2
"""

import argparse
import importlib
import json
import platform
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from align.commands.self_test import make_model
from align.io.files import write_json
from scripts.gpu_check.cases import FAILED, LEFT_OUT, PASSED, Settings, run_cases
from scripts.gpu_check.page import write_page

CHECKS = ("exactness", "processes", "sampling", "speed")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "flash-attn", "liger-kernel", "vllm")
JSON, PAGE = "gpu_check.json", "gpu_check.html"
VLLM = Path(".venv-vllm") / "bin" / "python"
SECONDS = 3600
"""Most seconds of one check."""


def machine() -> dict[str, Any]:
    """The GPUs, and the versions of what is installed."""
    gpus = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    return {
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run_check(name: str, settings: Settings, output: Path, seconds: float = SECONDS) -> dict[str, Any]:
    """Run one check in a process of its own; return case -> outcome."""
    settings_file, result = output / "settings.json", output / f"{name}.json"
    settings.save(settings_file)
    result.unlink(missing_ok=True)
    python = str(VLLM) if name == "sampling" and VLLM.exists() else sys.executable
    command = [python, "-m", "scripts.gpu_check.run", "--check", name, "--output", str(output)]
    with (output / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, check=False, timeout=seconds).returncode
            ended = f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            code, ended = 1, f"it took more than {seconds:g} seconds"
    if not result.exists():
        return {name: {"outcome": FAILED, "reason": f"{ended}, see {log.name}", "numbers": {}, "seconds": 0.0}}
    found: dict[str, Any] = json.loads(result.read_text())
    if code != 0:
        for case in found.values():
            if case["reason"] in ("not reached", "the process ended in this case"):
                case["reason"] += f": {ended}, see {log.name}"
    return found


def check_all(settings: Settings, names: list[str], output: Path) -> dict[str, Any]:
    """Run checks, and write the JSON file and the page after each."""
    report: dict[str, Any] = {"machine": machine(), "settings": {}, "checks": {}}
    report["settings"] = {name: getattr(settings, name) for name in Settings.__slots__ if name != "work"}
    for name in names:
        report["checks"][name] = run_check(name, settings, output)
        report["counts"] = Counter(case["outcome"] for found in report["checks"].values() for case in found.values())
        write_json(output / JSON, report)
        write_page(output / PAGE, report)
        for case, found in report["checks"][name].items():
            print(f"{found['outcome']:8}  {name}: {case}{' (' + found['reason'] + ')' if found['reason'] else ''}")
    return report


def _settings(arguments: argparse.Namespace, output: Path) -> Settings:
    model = arguments.model
    if model == "tiny":
        model = str(make_model(output / "tiny"))
    sizes = (16, 256, 128, 10) if torch.cuda.is_available() else (2, 12, 8, 2)
    given = (arguments.pairs, arguments.prompt, arguments.completion, arguments.steps)
    chosen = [size if own is None else own for own, size in zip(given, sizes, strict=True)]
    pairs, prompt, completion, steps = chosen
    return Settings(model, pairs, prompt, completion, steps, str(output / "work"), arguments.lora)


def main() -> None:
    """Parse the arguments, run the checks, print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder, hub id, or tiny: a random model of two layers")
    parser.add_argument("--output", type=Path, default=Path("build/gpu_check"))
    parser.add_argument("--only", nargs="*", choices=CHECKS, default=list(CHECKS), help="checks to run")
    parser.add_argument("--pairs", type=int, help="pairs of a step [16; 2 without a GPU]")
    parser.add_argument("--prompt", type=int, help="words of a prompt [256; 12 without a GPU]")
    parser.add_argument("--completion", type=int, help="words of a response [128; 8 without a GPU]")
    parser.add_argument("--steps", type=int, help="steps that are timed [10; 2 without a GPU]")
    parser.add_argument("--lora", action="store_true", help="time the training of an adapter")
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    if arguments.check:
        cases = importlib.import_module(f"scripts.gpu_check.{arguments.check}").cases()
        run_cases(cases, Settings.read(output / "settings.json"), output / f"{arguments.check}.json")
        return
    output.mkdir(parents=True, exist_ok=True)
    report = check_all(_settings(arguments, output), arguments.only, output)
    counts = report["counts"]
    print(f"{counts[PASSED]} passed, {counts[FAILED]} failed, {counts[LEFT_OUT]} left out: {output / PAGE}")
    sys.exit(1 if counts[FAILED] else 0)


if __name__ == "__main__":
    main()
