"""MADPO's protocol on a real model: three data qualities, eight methods, equal tuning, seeds.

Prompts are the first words of movie-review snippets, the gold reward is 3 x VADER, labels are drawn from it by
Bradley-Terry. high: two samples of the reference model; low: the better of them against the review's own words; medium:
half and half. Every method is trained with each of its three candidates on the tuning seed and judged on the validation
prompts; the candidate with the highest mean gold reward there is trained on the test seeds and judged on the test
prompts, which no choice has seen. The published setting is always a candidate; with --candidates 1 it is the only one
and nothing is tuned.

A cell (quality, method, seed, setting) is a stage with its cell.json under --output: a stopped study resumes, with
--known on another machine too. The table, the frontier and cells.jsonl are written from the cells that exist.

    python -m scripts.reproduce.policy --minutes 600
    python -m scripts.reproduce.policy --candidates 1 --margins noise --qualities high \\
        --methods dpo madpo mmpo relabelled trust
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, get_args

from align.commands.generate import write_table
from align.config import load_config
from align.errors import AlignError, ConfigError
from align.io.console import configure, log
from align.io.files import write_json
from align.io.stage import Stage
from scripts.bootstrap import bootstrap_mean
from scripts.reproduce.policy_protocol.cells import (
    CANDIDATES,
    TRUST,
    Parameters,
    Split,
    choose,
    reads_margins,
    run_cell,
    run_reference,
)
from scripts.reproduce.policy_protocol.data import (
    QUALITIES,
    Margins,
    Quality,
    Sizes,
    Study,
    make_labels,
    make_margins,
    make_prompts,
    make_reward_model,
    make_samples,
    read_known,
)
from scripts.reproduce.policy_protocol.report import draw_frontier, markdown, primary, primary_markdown, summarize
from scripts.tables import update_page

MARK = "scripts/reproduce/policy.py"
"""Mark of the tables in a page."""
TUNING_SEED = 1000
VALIDATION = Split("validation", (1.0,))


def read_study(arguments: argparse.Namespace) -> Study:
    """The study with models, adapter and trainer fields of a run file and the sizes of the command line.

    Raises:
        ConfigError: the file has no reward model, policy or evaluation.
    """
    config = load_config(arguments.config, arguments.set)
    if config.reward is None or config.train is None or config.evaluate is None or config.sample is None:
        raise ConfigError(
            f"{arguments.config}: expected `reward`, `sample`, `train` and `evaluate`",
            code="config-key",
            hint="give a file like configs/demo.yaml",
        )
    sizes = Sizes(
        arguments.reward_pairs, arguments.train_prompts, arguments.validation_prompts, arguments.test_prompts,
        config.sample.max_new_tokens, config.evaluate.batch_size, arguments.label_scale,
    )  # fmt: skip
    return Study(
        arguments.output,
        arguments.snippets,
        sizes,
        config.train,
        config.reward,
        arguments.margins,
        config.evaluate.judge[0].name,
        read_known(arguments.known),
    )


class Runner:
    """Makes cells and, once, what they need."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.prompts = make_prompts(study)
        if study.margins in ("outside", "noise"):
            make_reward_model(study, self.prompts)
        self.made: dict[tuple[str, int, bool], Stage] = {}
        self.cells: list[dict[str, Any]] = []
        """Every cell so far, with those that chose the settings."""
        self.tried: dict[str, list[dict[str, Any]]] = {}
        """Quality and method -> reward of each candidate on the validation prompts."""

    def pairs(self, quality: Quality, seed: int, *, with_margins: bool) -> Stage:
        """The labeled pairs of a quality and seed."""
        place = (quality, seed, with_margins)
        if place not in self.made:
            if with_margins:
                labels = self.pairs(quality, seed, with_margins=False)
                self.made[place] = make_margins(self.study, labels, quality, seed)
            else:
                samples = make_samples(self.study, self.prompts, seed)
                self.made[place] = make_labels(self.study, samples, quality, seed)
        return self.made[place]

    def cell(self, quality: Quality, method: str, parameters: Parameters, seed: int, split: Split) -> dict[str, Any]:
        """A cell, computed or read."""
        pairs = self.pairs(quality, seed, with_margins=reads_margins(method))
        self.cells.append(run_cell(self.study, pairs, quality, method, parameters, seed, split))
        return self.cells[-1]


def tune(runner: Runner, quality: Quality, method: str, candidates: int) -> Parameters:
    """The best on the validation prompts of a method's first ``candidates`` settings."""
    tried = CANDIDATES[method][:candidates]
    if len(tried) == 1:
        return tried[0]
    cells = [runner.cell(quality, method, one, TUNING_SEED, VALIDATION) for one in tried]
    runner.tried[f"{quality}, {method}"] = [
        {"parameters": cell["parameters"], "reward": bootstrap_mean(cell["decoded"]["1"]["reward"], seed=0).to_dict()}
        for cell in cells
    ]
    return tried[choose(cells)]


def run(arguments: argparse.Namespace, study: Study) -> None:
    """Tune, then test, every quality and method; write the table after each cell."""
    runner, test = Runner(study), Split("test", tuple(arguments.temperatures))
    end = time.monotonic() + 60 * arguments.minutes
    study.margins_root.mkdir(parents=True, exist_ok=True)
    references: list[dict[str, Any]] = []
    cells: list[dict[str, Any]] = []
    chosen: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    first: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        if time.monotonic() > end:
            break
        references.append(run_reference(study, seed, test))
        for quality in arguments.qualities:
            for method in arguments.methods:
                if time.monotonic() > end:
                    break
                name = f"{quality}, {method}"
                if name not in chosen:
                    chosen[name] = tune(runner, quality, method, arguments.candidates)
                cells.append(runner.cell(quality, method, chosen[name], seed, test))
                rows = summarize(cells, references)
                first = primary(rows, cells, references)
                table = {
                    "chosen": chosen, "tried": runner.tried, "rows": rows, "primary": first,
                    "references": [cell["key"] for cell in references],
                    "left_out": references[0]["decoded"]["1"].get("left_out", {}),
                }  # fmt: skip
                write_json(study.margins_root / "table.json", table)
                write_table([*references, *runner.cells], study.margins_root / "cells.jsonl")
    if rows:
        draw_frontier(rows, study.margins_root / "frontier.svg")
    tables = "\n\n".join(filter(None, (primary_markdown(first), markdown(rows))))
    print(tables)
    if arguments.document:
        update_page(arguments.document, tables, arguments.mark)
    log.info("%d test cells; %s", len(cells), study.margins_root / "table.json")


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="models and trainer fields")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a key of the config")
    parser.add_argument("--snippets", type=Path, default=Path(".assets/snippets"))
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce-policy"))
    parser.add_argument(
        "--known", nargs="*", type=Path, default=[], metavar="CELLS.jsonl", help="cells of earlier runs, not made again"
    )
    parser.add_argument("--margins", choices=get_args(Margins), default="outside", help="where margins come from")
    parser.add_argument("--qualities", nargs="+", choices=QUALITIES, default=list(QUALITIES))
    parser.add_argument(
        "--methods", nargs="+", choices=list(CANDIDATES), default=[name for name in CANDIDATES if name != TRUST]
    )
    parser.add_argument("--candidates", type=int, choices=(1, 2, 3), default=3, help="settings tried; 1 tunes nothing")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="test seeds")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.5, 0.7, 1.0, 1.3], help="1 among them")
    parser.add_argument("--reward-pairs", type=int, default=2000)
    parser.add_argument("--train-prompts", type=int, default=512)
    parser.add_argument("--validation-prompts", type=int, default=200)
    parser.add_argument("--test-prompts", type=int, default=400)
    parser.add_argument(
        "--label-scale",
        type=float,
        default=1.0,
        help="factor on gold margins; 1 as published",
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further test cell after this time")
    parser.add_argument("--document", type=Path, help="page whose tables to replace, e.g. docs/results.md")
    parser.add_argument("--mark", default=MARK, help="which of the page's tables to replace: what its mark says")
    arguments = parser.parse_args()
    configure()
    if 1.0 not in arguments.temperatures:
        parser.error("--temperatures: expected 1 among them, the temperature of the table")
    try:
        run(arguments, read_study(arguments))
    except AlignError as error:
        sys.stderr.write(f"error {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
