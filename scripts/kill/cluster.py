"""Kill workers, machines and commands of a Ray cluster at random moments of a filter; compare with an undisturbed one.

    python -m scripts.kill.cluster --kills 10 --output kills.json -- pairs.jsonl --index ivf

Machines are nodes of one cluster on this machine. Each run gets one kill: a random while after the first shard of one
of the filter's passes appears, a worker or a machine (which is replaced) or the command itself gets SIGKILL; a killed
command is started again. In the end the kept and the dropped pairs must be those of a run without a cluster, every row
once, and nothing that was finished may have been made again. Prints JSON.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from align.filtering.tables import DROPPED, KEPT
from align.io.console import configure, log
from align.io.files import write_json

PASSES = ("survey-*", "ood-*", "embedding-*", "neighbours-*/lists-*", "neighbours-*/best-*", "quality-*")
"""Folders in a filter's cache that a cluster works on, in their order."""
KINDS = ("worker", "machine", "command")
SCORES = ("quality", "diversity", "ood", "importance")
TOLERANCE = 1e-5
MACHINES = 2
AFTER_SECONDS = 1.5
POLL_SECONDS = 0.01
LIMIT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Kill:
    """One SIGKILL and what came of it."""

    kind: str
    aimed_at: str
    """Pattern of the pass, one of ``PASSES``."""
    hit: bool
    """Whether there was something of the kind to kill before the command ended."""
    whole: int
    """Number of finished shards and columns at that moment."""
    made_again: list[str]
    """Finished files that were made again."""
    differences: list[str]
    """Differences between its tables and those of the run without a cluster."""


class Hosts:
    """A cluster whose machines can be killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.machines = [self.cluster.add_node(num_cpus=1) for _ in range(MACHINES)]

    @property
    def address(self) -> str:
        """Address of the cluster, host:port."""
        return str(self.cluster.address)

    def kill_machine(self, rng: random.Random) -> bool:
        """Remove one machine and add another."""
        self.cluster.remove_node(self.machines.pop(rng.randrange(len(self.machines))), allow_graceful=False)
        self.machines.append(self.cluster.add_node(num_cpus=1))
        return True


def kill_worker(rng: random.Random) -> bool:
    """Kill one process that works on a shard; whether there was one."""
    workers = [process for process in psutil.process_iter(["cmdline"]) if _works(process.info["cmdline"])]
    if workers:
        rng.choice(workers).kill()
    return bool(workers)


def _works(command: list[str] | None) -> bool:
    return bool(command) and command[0].startswith("ray::Worker")  # type: ignore[index]


class Attempt:
    """One process of the command."""

    def __init__(self, arguments: list[str], output: Path, cluster: str | None) -> None:
        command = [sys.executable, "-m", "align.cli", "filter", "run", *arguments, "--output", str(output)]
        command += [] if cluster is None else ["--cluster", cluster]
        self.log = (output.parent / f"{output.name}.log").open("a")
        self.process = subprocess.Popen(command, stderr=self.log, stdout=self.log)

    def wait_for(self, cache: Path, pattern: str) -> bool:
        """Wait until a pass begins; whether it did before the process ended."""
        while self.process.poll() is None:
            if any(cache.glob(f"*/{pattern}/shards/*")):
                return True
            time.sleep(POLL_SECONDS)
        return False

    def kill(self) -> bool:
        """Send SIGKILL and wait."""
        self.process.kill()
        self.process.wait()
        return True

    def end(self) -> None:
        """Wait for the end.

        Raises:
            SystemExit: the command failed.
        """
        if code := self.process.wait(LIMIT_SECONDS):
            raise SystemExit(f"the command ended with {code}:\n{Path(self.log.name).read_text()[-2000:]}")


def finished(cache: Path) -> dict[Path, int]:
    """Modification time of each finished shard and of each column of a finished pass."""
    found = {}
    for file in (*cache.rglob("shards/*.parquet"), *cache.rglob("columns/*.npy")):
        with contextlib.suppress(FileNotFoundError):
            found[file] = file.stat().st_mtime_ns
    return found


def differences(one: Path, other: Path) -> list[str]:
    """Tables and columns in which the results of two filters differ."""
    found = []
    for name in (KEPT, DROPPED):
        first, second = (pq.read_table(folder / name, partitioning=None) for folder in (one, other))
        if first["id"].to_pylist() != second["id"].to_pylist():
            found.append(f"{name}: ids")
            continue
        for column in SCORES:
            here, there = (table[column].to_numpy().astype(np.float64) for table in (first, second))
            if not np.allclose(here, there, atol=TOLERANCE, equal_nan=True):
                found.append(f"{name}: {column}")
    return found


def one_kill(kind: str, pattern: str, arguments: list[str], output: Path, hosts: Hosts, rng: random.Random) -> Kill:
    """Run the filter on the cluster with one kill."""
    cache = output / "parts"
    attempt = Attempt(arguments, output, hosts.address)
    hit, whole = attempt.wait_for(cache, pattern), {}
    if hit:
        time.sleep(rng.uniform(0, AFTER_SECONDS))
        hit = attempt.process.poll() is None
    if hit:
        whole = finished(cache)
        hit = (
            attempt.kill() if kind == "command" else hosts.kill_machine(rng) if kind == "machine" else kill_worker(rng)
        )
    if hit and kind == "command":
        whole = finished(cache)
        attempt = Attempt(arguments, output, hosts.address)
    again = set()
    while attempt.process.poll() is None:
        now = finished(cache)
        again |= {str(file.relative_to(cache)) for file in whole if now.get(file, whole[file]) != whole[file]}
        time.sleep(10 * POLL_SECONDS)
    attempt.end()
    return Kill(kind, pattern, hit, len(whole), sorted(again), differences(output.with_name("alone"), output))


def run(arguments: list[str], folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Filter once without a cluster, then once for each kill.

    Args:
        arguments: command line of `align filter run`.
        folder: receives the outputs.
        kills: number of kills.
        seed: draws passes and moments.
    """
    rng = random.Random(seed)
    Attempt(arguments, folder / "alone", None).end()
    made: list[Kill] = []
    passes = [PASSES[k % len(PASSES)] for k in range(kills)]
    rng.shuffle(passes)
    hosts = Hosts()
    try:
        for number, pattern in enumerate(passes):
            kind = KINDS[number % len(KINDS)]
            made.append(one_kill(kind, pattern, arguments, folder / f"killed-{number}", hosts, rng))
            log.info("%d of %d: %s", number + 1, kills, made[-1])
    finally:
        hosts.cluster.shutdown()
    return {
        "kills": [asdict(kill) for kill in made],
        "hit": {kind: sum(kill.hit and kill.kind == kind for kill in made) for kind in KINDS},
        "differences": sum(len(kill.differences) for kill in made),
        "made_again": sum(len(kill.made_again) for kill in made),
    }


def main() -> None:
    """Run the experiment and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "arguments", nargs="+", help="command line of `align filter run` without --output and --cluster"
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    configure()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        found = run(arguments.arguments, Path(folder), arguments.kills, arguments.seed)
    if arguments.output is not None:
        write_json(arguments.output, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
