"""Kill a run repeatedly, at random moments of every stage and during writes; compare it with an undisturbed one.

    python -m scripts.kill.run RUN.yaml --kills 25 --output kills.json

The run is made once without interruption. A second one, in another folder, gets SIGKILL: in every stage in turn, after
a random part of the time that the stage took or as soon as a new file of the stage appears; then the same command is
started again. In the end the two folders must hold the same files, byte for byte except for those that hold times, and
no finished stage may have run again. The result is JSON: the kills, what each recovery found, the differences.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.io.console import configure, log
from align.io.files import read_json, write_json
from align.io.stage import MANIFEST
from align.run.log import FILE as LOG
from align.run.plan import plan

REPORT = "report"
TIMED = frozenset({MANIFEST, "report.json", "report.html", "summary.json", "run.json", LOG})
"""Files that hold a date, seconds or their own path."""
TEMPORARY = (".partial", ".replaced", ".tmp", ".partial.npy")
POLL_SECONDS = 0.002
LIMIT_SECONDS = 600.0
ROUNDS = 10
"""Runs after which a stage that no kill has hit is given up; kills come sooner from run to run."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One SIGKILL."""

    aimed_at: str
    """Stage that was to be hit."""
    how: str
    """``time``: after a random part of the stage's seconds; ``write``: as a new file of the stage appeared."""
    hit: str
    """Stage that was running; ``report`` after the last one, ``start`` before the first."""
    unfinished: list[str]
    """The first five files that had temporary names at that moment."""
    finished: list[str]
    """Stages whose folder was complete."""


class Attempt:
    """One process of the run and what it has logged so far."""

    def __init__(self, run: Path, output: Path) -> None:
        command = [sys.executable, "-m", "align.cli", "run", run.name, "--set", f"output_dir={output}"]
        self.process = subprocess.Popen(command, cwd=run.parent, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self.process.poll() is None

    def started(self) -> list[str]:
        """Stages that this process has begun."""
        return [line.removesuffix(": running\n") for line in list(self.lines) if line.endswith(": running\n")]

    def ended(self, stage: str) -> bool:
        """Whether this process has finished or skipped the stage."""
        return any(line.startswith((f"{stage}: done", f"{stage}: up to date")) for line in list(self.lines))

    def kill(self) -> None:
        """Send SIGKILL and wait."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            RuntimeError: the run failed.
        """
        code = self.process.wait(timeout=LIMIT_SECONDS)
        if code != 0:
            raise RuntimeError(f"the run ended with {code}:\n{''.join(self.lines)}")


def kill_anywhere(run: Path, scratch: Path, kills: int, seed: int, *, every_stage: bool) -> dict[str, Any]:
    """The experiment that the module describes.

    Args:
        run: run file; its ``output_dir`` is replaced.
        scratch: an empty folder.
        kills: number of kills.
        seed: draws the moments.
        every_stage: go on until every stage has been hit.
    """
    from align.config import load_config

    config = load_config(run)
    stages = [*plan(config), REPORT]
    Attempt(run, scratch / "whole").finish()
    whole, killed = scratch / "whole" / config.name, scratch / "killed" / config.name
    seconds = {name: read_json(whole / name / MANIFEST)["seconds"] for name in stages[:-1]}
    chance = random.Random(seed)
    done: list[Kill] = []
    repeated: list[str] = []
    rounds = 0
    found: list[str] = []
    missed = set(stages)
    while len(done) < kills or (every_stage and missed and rounds < ROUNDS):
        if rounds:
            killed.rename(killed.with_name(f"round-{rounds}"))
        rounds += 1
        sooner = {name: value / rounds for name, value in seconds.items()}
        for aim in _aims(stages, missed, (kills - len(done)) or len(missed), chance):
            whole_before = finished(killed, stages)
            attempt = Attempt(run, scratch / "killed")
            hit = _shoot(attempt, stages, aim, killed, sooner, chance)
            repeated += [stage for stage in attempt.started() if stage in whole_before]
            if hit is None:
                break
            done.append(hit)
            log.info("kill %d of %d: in %s, by %s", len(done), kills, hit.hit, hit.how)
        whole_before = finished(killed, stages)
        last = Attempt(run, scratch / "killed")
        last.finish()
        repeated += [stage for stage in last.started() if stage in whole_before]
        found += run_differences(whole, killed)
        missed = set(stages) - {kill.hit for kill in done}
    return {
        "kills": len(done),
        "seed": seed,
        "rounds": rounds,
        "hit": {stage: sum(kill.hit == stage for kill in done) for stage in ["start", *stages]},
        "as_a_file_appeared": sum(kill.how == "write" for kill in done),
        "recoveries": len(done),
        "stages_repeated": repeated,
        "differences": found,
        "files_compared": len(_files(whole)),
        "every_kill": [asdict(kill) for kill in done],
    }


def finished(folder: Path, stages: list[str]) -> set[str]:
    """Stages whose work is done: complete under their own name, or complete and about to be renamed."""
    names = [name for name in stages if name != REPORT]
    return {
        name for name in names
        if (folder / name / MANIFEST).exists() or (folder / f"{name}.partial" / MANIFEST).exists()
    }  # fmt: skip


def run_differences(whole: Path, other: Path) -> list[str]:
    """Differences between two run folders, one line each: missing files, content, stage keys."""
    left, right = _files(whole), _files(other)
    lines = [f"{name}: in one folder only" for name in sorted(left ^ right)]
    for name in sorted(left & right):
        one, two = whole / name, other / name
        if one.name == MANIFEST:
            same = read_json(one)["key"] == read_json(two)["key"]
        else:
            same = one.name in TIMED or one.read_bytes() == two.read_bytes()
        if not same:
            lines.append(f"{name}: different content")
    return lines


def _aims(stages: list[str], missed: set[str], kills: int, chance: random.Random) -> list[int]:
    """Indices of the stages to aim at, in order; stages that were never hit come first, equally often."""
    places = [k for k, stage in enumerate(stages) if stage in missed] or list(range(len(stages)))
    chance.shuffle(places)
    return sorted(places[k % len(places)] for k in range(kills))


def _shoot(
    attempt: Attempt, stages: list[str], aim: int, folder: Path, seconds: dict[str, float], chance: random.Random
) -> Kill | None:
    """Kill the process in the stage aimed at, or in the next unfinished one; None if the process ended before."""
    whole = finished(folder, stages)
    stage = next(name for name in stages[aim:] if name not in whole)
    how = chance.choice(["time", "write"])
    if stage == REPORT:
        _until(attempt, lambda: attempt.ended(stages[-2]))
        before, wait = folder, chance.uniform(0, 1.0)
    else:
        _until(attempt, lambda: stage in attempt.started() or attempt.ended(stage))
        before, wait = folder / f"{stage}.partial", chance.uniform(0, seconds[stage])
    known = _files(before)
    if how == "write":
        limit = LIMIT_SECONDS if stage != REPORT else 1.0
        _until(attempt, lambda: bool(_files(before) - known) or attempt.ended(stage), limit)
        wait = chance.uniform(0, 0.005)
    _until(attempt, lambda: False, wait)
    if not attempt.alive:
        return None
    attempt.kill()
    running = [name for name in attempt.started() if not attempt.ended(name)]
    hit = running[-1] if running else (REPORT if attempt.ended(stages[-2]) else "start")
    names = sorted(name for name in _files(folder) if any(part.endswith(TEMPORARY) for part in Path(name).parts))
    return Kill(stage, how, hit, names[:5], sorted(finished(folder, stages)))


def _until(attempt: Attempt, condition: Any, limit: float = LIMIT_SECONDS) -> None:
    """Wait until the condition holds, the process has ended, or ``limit`` seconds have passed."""
    end = time.monotonic() + limit
    while attempt.alive and not condition() and time.monotonic() < end:
        time.sleep(POLL_SECONDS)


def _files(folder: Path) -> set[str]:
    found = set()
    for root, _, names in os.walk(folder):
        found |= {str((Path(root) / name).relative_to(folder)) for name in names}
    return found


def main() -> None:
    """Run the experiment and print the result without the single kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run file")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every-stage", action="store_true", help="go on until every stage has been hit")
    parser.add_argument("--output", type=Path, default=Path("build/kill_anywhere.json"))
    options = parser.parse_args()
    configure()
    with tempfile.TemporaryDirectory() as scratch:
        result = kill_anywhere(
            options.run.resolve(), Path(scratch), options.kills, options.seed, every_stage=options.every_stage
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, result)
    shown = {name: value for name, value in result.items() if name != "every_kill"}
    sys.stdout.write(json.dumps(shown, indent=2) + "\n")
    sys.exit(bool(result["differences"] or result["stages_repeated"]))


if __name__ == "__main__":
    main()
