"""A whole job with trl alone and with this program: the same models, data, numbers of tokens and results. Prints JSON.

    reward model on human-rated pairs -> scores -> DPO of all parameters on pairs of dialogue lengths ->
    greedy completions of the policy and its reference -> verdicts of VADER and of the reward model

    trl       scripts/bench/job_trl.py with trl's defaults
    trl-best  the same with the settings that are fastest on a CPU
    align     `align run`

Each route is a process of its own, start included, and the routes take turns. Times are CPU seconds of the process and
its children, which other work on the machine hardly changes, and wall seconds. ``align run`` also measures the policy's
KL to the reference and writes a report; the other routes do not.

    OMP_NUM_THREADS=1 python -m scripts.bench.job
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from scripts.bench.job_data import write_files
from scripts.bench.record import Measure, add_keep, finish

TRL_DEFAULTS, TRL_BEST, OWN = "trl", "trl-best", "align"
STAGES = {
    "reward model": ("pairs-reward", "reward"),
    "scores": ("pairs", "margins"),
    "policy": ("train-dpo",),
    "completions": ("generate-reference", "generate-dpo"),
    "judge": ("evaluate",),
}
"""Stage of the job -> stages of ``align run``."""


def spent() -> tuple[float, float]:
    """CPU seconds of all finished children, and wall seconds."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime, time.perf_counter()


def run(command: list[str], log: Path) -> tuple[str, dict[str, float]]:
    """The output of a command, and its CPU and wall seconds.

    Raises:
        RuntimeError: it failed; the end of what it wrote follows.
    """
    before = spent()
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    after = spent()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-4000:]}")
    return done.stdout, {"cpu": after[0] - before[0], "wall": after[1] - before[1]}


def with_trl(folder: Path, arguments: argparse.Namespace, *, best: bool) -> dict[str, Any]:
    """The job with trl alone."""
    command = [sys.executable, "-m", "scripts.bench.job_trl", str(folder), "--tokens", str(arguments.tokens)]
    command += ["--policy", arguments.policy, "--reward", arguments.reward] + (["--best"] if best else [])
    output, whole = run(command, folder / "log")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    shutil.rmtree(folder / "trl-reward")
    shutil.rmtree(folder / "trl-policy")
    return found | {"whole": whole}


def run_file(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The job as a run file."""
    common = {"num_train_epochs": 1, "logging_steps": 1, "bf16": False}
    return {
        "name": "job",
        "output_dir": str(folder / "runs"),
        "pairs": {"path": str(folder / "pairs.jsonl")},
        "reward": {
            "model": arguments.reward,
            "pairs": {"path": str(folder / "reward_pairs.jsonl")},
            "eval_pairs": {"path": str(folder / "heldout.jsonl")},
            "max_length": 512,
            "trainer": {**common, "per_device_train_batch_size": 16, "learning_rate": 5e-5},
        },
        "train": {
            "model": arguments.policy,
            "methods": {"dpo": {"loss": "dpo", "parameters": {"beta": 0.1}}},
            "trainer": {**common, "per_device_train_batch_size": 4},
        },
        "evaluate": {
            "prompts": str(folder / "prompts.jsonl"), "judge": "vader", "max_new_tokens": arguments.tokens, "top_k": 1,
        },
    }  # fmt: skip


def with_align(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The job with ``align run``; its manifests hold the seconds of its stages."""
    file, root = folder / "job.yaml", folder / "runs" / "job"
    file.write_text(yaml.safe_dump(run_file(folder, arguments)), encoding="utf-8")
    _, whole = run([sys.executable, "-m", "align.cli", "run", str(file)], folder / "log")
    manifests = {path.parent.name: json.loads(path.read_text()) for path in root.glob("*/manifest.json")}
    stages = {
        stage: {
            "cpu": sum(manifests[name]["cpu_seconds"] for name in names),
            "wall": sum(manifests[name]["seconds"] for name in names),
        }
        for stage, names in STAGES.items()
    }
    stages["start"] = {kind: whole[kind] - sum(stage[kind] for stage in stages.values()) for kind in ("cpu", "wall")}
    results = _results(root)
    shutil.rmtree(root.parent)
    return {"stages": stages, "results": results, "whole": whole}


def _results(root: Path) -> dict[str, Any]:
    """The results of a run in the form of those of scripts/bench/job_trl.py."""
    metrics = {name: json.loads((root / name / "metrics.json").read_text()) for name in ("reward", "evaluate")}
    history = json.loads((root / "train-dpo" / "history.json").read_text())["history"]
    tables = {
        name: Dataset.from_parquet(str(root / folder / "completions.parquet"), cache_dir=str(root / "cache"))
        for name, folder in (("reference", "generate-reference"), ("policy", "generate-dpo"))
    }
    judged = metrics["evaluate"]["policies"]
    return {
        "heldout_accuracy": metrics["reward"]["heldout"]["accuracy"],
        "losses": [row["loss"] for row in history if "loss" in row],
        "new_tokens": {name: sum(table["tokens"]) for name, table in tables.items()},
        "reference_texts": tables["reference"]["text"][:],
        "judge": {name: judged[key]["reward"] for name, key in (("reference", "reference"), ("policy", "dpo"))},
    }


def summarize(rounds: list[dict[str, dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Measure]]:
    """What the routes gave and how far they agree, and the measures by stage and as a whole."""
    measures: dict[str, Measure] = {}
    table: dict[str, Any] = {}
    for stage in ("whole", "start", *STAGES):
        took = {
            route: [(one[route]["whole"] if stage == "whole" else one[route]["stages"][stage]) for one in rounds]
            for route in rounds[0]
        }
        cpu = {route: [row["cpu"] for row in rows] for route, rows in took.items()}
        table[stage] = {
            route: {kind: statistics.median(row[kind] for row in rows) for kind in ("cpu", "wall")}
            for route, rows in took.items()
        }
        measures[f"{stage}: align"] = Measure(cpu[OWN], "s")
        for other in (TRL_DEFAULTS, TRL_BEST):
            measures[f"{stage}: align / {other}"] = Measure(
                [a / b for a, b in zip(cpu[OWN], cpu[other], strict=True)], "ratio"
            )
            table[stage][f"{other} / align"] = statistics.median(
                b / a for a, b in zip(cpu[OWN], cpu[other], strict=True)
            )
    found = {route: one["results"] for route, one in rounds[-1].items()}
    own, other = found[OWN], found[TRL_DEFAULTS]
    same = [a == b for a, b in zip(own["reference_texts"], other["reference_texts"], strict=True)]
    agree = {
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(own["losses"], other["losses"], strict=True)),
        "same_reference_texts": sum(same) / len(same),
    }
    for result in found.values():
        del result["reference_texts"]
    return {"stages": table, "agreement": agree, "results": found}, measures


def main() -> None:
    """Run the rounds and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(".assets"))
    parser.add_argument("--policy", default=".assets/smollm2")
    parser.add_argument("--reward", default=".assets/minilm")
    parser.add_argument("--reward-pairs", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per completion")
    parser.add_argument("--rounds", type=int, default=2)
    add_keep(parser)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    routes: dict[str, Callable[[Path], dict[str, Any]]] = {
        TRL_DEFAULTS: lambda folder: with_trl(folder, arguments, best=False),
        TRL_BEST: lambda folder: with_trl(folder, arguments, best=True),
        OWN: lambda folder: with_align(folder, arguments),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write_files(
            folder, arguments.assets, reward_pairs=arguments.reward_pairs, pairs=arguments.pairs,
            prompts=arguments.prompts, seed=0,
        )  # fmt: skip
        rounds: list[dict[str, dict[str, Any]]] = []
        for number in range(arguments.rounds):
            rounds.append({})
            for route, work in routes.items():
                rounds[-1][route] = work(folder)
                took = {name: round(stage["cpu"], 1) for name, stage in rounds[-1][route]["stages"].items()}
                whole = rounds[-1][route]["whole"]["cpu"]
                print(f"round {number + 1}, {route}: {whole:.0f} CPU s, {took}", file=sys.stderr, flush=True)
    found, measures = summarize(rounds)
    finish("job", {"data": data} | found, measures, arguments)


if __name__ == "__main__":
    main()
