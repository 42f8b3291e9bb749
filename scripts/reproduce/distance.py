"""Is a method better than DPO at equal distance from the reference? Ten seeds, paths of constant-rate checkpoints.

High-quality pairs (two samples of the reference on openings of movie reviews), labels by Bradley-Terry from a gold
reward of 3 x VADER, margins of three outside reward models that are crossed with the seeds. Sample seed, label draw,
training seed and decoding seed are separate numbers; the two label draws of a sample seed are antithetic. A policy is
kept after a quarter, a half and all of its steps and compared at KL 1 by interpolation in sqrt(KL). The design stands
in scripts/reproduce/equal_distance/design.py and docs/results.md, fixed before a cell was computed.

A cell is a stage with its cell.json under --output: a stopped study resumes, with --known on another machine too. No
table is printed without --table, so that nobody looks while cells are missing.

    python -m scripts.reproduce.distance --minutes 600
    python -m scripts.reproduce.distance --table --known studies/distance/cells.jsonl
    python -m scripts.reproduce.distance --pilot        # KL of DPO and soft labels on a seed that is never tested
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from align.commands.generate import write_table
from align.config import load_config
from align.errors import AlignError, ConfigError
from align.io.console import configure, log
from align.io.files import write_json
from scripts.reproduce.equal_distance.cells import run_cell, run_reference
from scripts.reproduce.equal_distance.data import Study
from scripts.reproduce.equal_distance.design import ARMS, BLOCKS, PILOT_SEED, Place, Sizes, places
from scripts.reproduce.equal_distance.report import markdown, summarize
from scripts.reproduce.policy_protocol.data import read_known
from scripts.tables import update_page

MARK = "scripts/reproduce/distance.py"
"""Mark of the table in a page."""


def read_study(arguments: argparse.Namespace) -> Study:
    """The study with models, adapter and trainer fields of a run file.

    Raises:
        ConfigError: the file has no reward model or policy.
    """
    config = load_config(arguments.config, arguments.set)
    if config.reward is None or config.train is None:
        raise ConfigError(
            f"{arguments.config}: expected `reward` and `train`",
            code="config-key",
            hint="give a file like configs/demo.yaml",
        )
    given = {name: getattr(arguments, name) for name in ("train_prompts", "seen_prompts", "block", "reward_pairs")}
    sizes = replace(Sizes(), **{name: value for name, value in given.items() if value is not None})
    if arguments.marks:
        sizes = replace(sizes, marks=tuple(arguments.marks))
    if arguments.learning_rate:
        sizes = replace(sizes, learning_rate=arguments.learning_rate)
    return Study(
        arguments.output, arguments.snippets, sizes, config.train, config.reward, known=read_known(arguments.known)
    )


def run(arguments: argparse.Namespace, study: Study) -> None:
    """Compute the missing cells; print the table only if asked."""
    study.root.mkdir(parents=True, exist_ok=True)
    if arguments.pilot:
        for method in ("dpo", "mmpo"):
            marks = run_cell(study, Place(method, PILOT_SEED, "a"))["marks"]
            log.info("%s: KL %s", method, ", ".join(f"{np.mean(mark['kl']):.2f}" for mark in marks))
        return
    end = time.monotonic() + 60 * arguments.minutes
    references = [run_reference(study, block) for block in range(BLOCKS)]
    cells: list[dict[str, Any]] = []
    wanted = list(places(tuple(arguments.methods), arguments.seeds))
    for place in wanted:
        if time.monotonic() > end:
            break
        cells.append(run_cell(study, place))
        write_table([*references, *cells], study.root / "cells.jsonl")
    log.info("%d of %d cells; %s", len(cells), len(wanted), study.root / "cells.jsonl")
    if arguments.table:
        rows = summarize(cells, {block["block"]: block["reward"] for block in references})
        write_json(study.root / "table.json", rows)
        print(markdown(rows))
        if arguments.document:
            update_page(arguments.document, markdown(rows), MARK)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="models and adapter")
    bf16 = ["train.trainer.bf16=true", "train.trainer.use_cpu=true"]
    parser.add_argument("--set", action="append", default=bf16, metavar="a.b=c", help="override a key of the config")
    parser.add_argument("--snippets", type=Path, default=Path(".assets/snippets"))
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce-distance"))
    parser.add_argument("--known", nargs="*", type=Path, default=[], metavar="CELLS.jsonl", help="of earlier runs")
    parser.add_argument("--methods", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, help="only so many seeds of each method")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further cell after this time")
    parser.add_argument("--pilot", action="store_true", help="only the KL of two policies of a seed of their own")
    parser.add_argument("--table", action="store_true", help="read the cells and print the table")
    parser.add_argument("--document", type=Path, help="page whose table to replace, e.g. docs/results.md")
    for name in ("train-prompts", "seen-prompts", "block", "reward-pairs"):
        parser.add_argument(f"--{name}", type=int, help="of the design by default")
    parser.add_argument("--marks", nargs="+", type=int, help="steps; of the design by default")
    parser.add_argument("--learning-rate", type=float, help="of the design by default")
    arguments = parser.parse_args()
    configure()
    try:
        run(arguments, read_study(arguments))
    except AlignError as error:
        sys.stderr.write(f"error {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
