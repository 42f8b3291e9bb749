"""Compare the complete program with DPO as trl ships it, at equal compute: a judge's reward against CPU seconds.

Pairs are two human-rated snippets, 30% of the labels flipped (scripts/study/filtered_policies.py). Every route has the
CPU seconds that trl's DPOTrainer takes for one pass over all pairs, and everything that a route does counts: its reward
models, its filter, tokenization, reference log-probs, steps. At each quarter of the budget the policy is saved; it is
judged afterwards on openings of other snippets by VADER, which no route sees.

    trl        all pairs, trl.DPOTrainer
    dpo        all pairs, this program's trainer
    whole      cross-fitted margins, the filtered quarter, soft MADPO, hold_batch against entanglement
    unguarded  the same without hold_batch

The learning rate is constant, so that training may end at any moment; adapter, batch and seed are the same everywhere.

    python -m scripts.reproduce.whole --seeds 0 1 2
"""

import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer

from align.commands.generate import write_table
from align.config import LossSection, RemedySection, TrainSection
from align.errors import AlignError
from align.evaluation.policies import Policy
from align.io.console import configure, log
from align.io.files import read_json, write_json
from align.io.hashing import digest
from align.io.stage import run_stage
from align.models.loading import load_policy, load_tokenizer
from align.stats import ends
from align.training.base.arguments import build_lora
from align.training.train import make_trainer
from scripts.figures import pyplot, save
from scripts.reproduce.policy_protocol.data import read_known
from scripts.reproduce.policy_protocol.judging import merge_adapter
from scripts.reproduce.policy_protocol.report import crossed, shown
from scripts.study.filtered_policies import (
    JUDGE,
    LORA,
    Sizes,
    Study,
    draw,
    judged,
    less,
    options,
    run_reference,
    scored_and_kept,
    trainer_fields,
)
from scripts.tables import table

ROUTES = {
    "trl": None,
    "dpo": LossSection(loss="dpo", parameters={"beta": 0.1}),
    "whole": LossSection(loss="soft_madpo", remedy=RemedySection(kind="hold_batch")),
    "unguarded": LossSection(loss="soft_madpo"),
}
FILTERED = ("whole", "unguarded")
FLIPPED = 0.3
MARKS = 4
LONGEST = 100


@dataclass
class Clock:
    """CPU seconds of this process since ``go``."""

    started: float = 0.0

    def go(self, seconds: float = 0.0) -> None:
        """Start the clock at this reading."""
        self.started = time.process_time() - seconds

    def read(self) -> float:
        """Seconds so far."""
        return time.process_time() - self.started


class Marks(TrainerCallback):
    """Saves the policy at every quarter of the budget and stops the training at its end.

    Args:
        trainer: the trainer of the policy.
        folder: receives mark-1 ... mark-4.
        clock: the route's clock; saving does not count.
        budget: CPU seconds; None takes quarters of all steps.
    """

    def __init__(self, trainer: Trainer, folder: Path, clock: Clock, budget: float | None) -> None:
        self.trainer = trainer
        self.folder = folder
        self.clock = clock
        self.budget = budget
        self.found: list[dict[str, float]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the policy if another quarter has passed."""
        seconds = self.clock.read()
        share = state.global_step / state.max_steps if self.budget is None else seconds / self.budget
        if share >= (len(self.found) + 1) / MARKS:
            self.found.append({"seconds": seconds, "step": state.global_step})
            self.trainer.save_model(str(self.folder / f"mark-{len(self.found)}"))
            self.clock.go(seconds)
        control.should_training_stop = len(self.found) == MARKS


def fields(study: Study, **more: Any) -> dict[str, Any]:
    """Fields of trl.DPOConfig for every route."""
    return trainer_fields(study, lr_scheduler_type="constant_with_warmup", logging_steps=1, **more)


def train_trl(study: Study, pairs: Dataset, seed: int, folder: Path) -> Trainer:
    """trl's own trainer, with the same model, adapter and fields."""
    transformers.set_seed(seed)
    args = DPOConfig(output_dir=str(folder / "trl"), seed=seed, beta=0.1, **fields(study))
    return DPOTrainer(
        model=load_policy(study.model, dtype="float32"),
        args=args,
        train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=load_tokenizer(study.model),
        peft_config=build_lora(LORA, path="peft", task_type="CAUSAL_LM"),
    )


def train_own(study: Study, pairs: Dataset, loss: LossSection, seed: int, folder: Path) -> Trainer:
    """This program's trainer; the budget ends it."""
    trainer = fields(study, num_train_epochs=LONGEST)
    config = TrainSection(model=study.model, methods={"route": loss}, peft=LORA, trainer=trainer)
    return make_trainer(pairs, config, "route", folder / "own", seed=seed)


def run_route(study: Study, route: str, seed: int, budget: float | None) -> dict[str, Any]:
    """Train within the budget and judge every mark.

    Args:
        study: models and sizes.
        route: key of ``ROUTES``.
        seed: draws the pairs and seeds the training.
        budget: CPU seconds; None for trl, which sets the budget.
    """
    named = {"route": route, "seed": seed, "flipped": FLIPPED}
    key = digest(named | {"sizes": asdict(study.sizes), "judge": JUDGE, "marks": MARKS})
    if key in study.known:
        return study.known[key]

    def work(folder: Path) -> None:
        clock, loss = Clock(), ROUTES[route]
        rows = draw(study, FLIPPED, seed)[0]
        clock.go()
        pairs = Dataset.from_list(rows)
        if route in FILTERED:
            scored, kept, _ = scored_and_kept(study, rows, folder / "filter", seed)
            pairs = scored.select(np.flatnonzero(kept))
        before = clock.read()
        trainer = train_trl(study, pairs, seed, folder) if loss is None else train_own(study, pairs, loss, seed, folder)
        marks = Marks(trainer, folder, clock, budget)
        trainer.add_callback(marks)
        trainer.train()
        facts = {"pairs": len(pairs), "before_training": before}
        judged_marks = []
        for number, mark in enumerate(marks.found, 1):
            merged = merge_adapter(folder / f"mark-{number}", study.model, folder / "merged")
            judged_marks.append(mark | judged(study, Policy(route, str(merged)), seed, folder))
            shutil.rmtree(folder / f"mark-{number}")
        for left in ("merged", "filter", "trl", "own"):
            shutil.rmtree(folder / left, ignore_errors=True)
        write_json(folder / "cell.json", named | facts | {"marks": judged_marks})

    inputs = {"key": key} | ({} if budget is None else {"budget": budget})
    stage = run_stage(f"{route}, seed {seed}", study.output / f"{route}-{seed}", inputs, work)
    return {"key": key} | read_json(stage.folder / "cell.json")


def summarize(cells: list[dict[str, Any]], references: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per route and mark, over the seeds that all routes have, with differences to trl and dpo at that mark."""
    start = {cell["seed"]: np.array(cell["reward"]) for cell in references}
    found = {(cell["route"], cell["seed"]): cell for cell in cells}
    seeds = [seed for seed in start if all((route, seed) in found for route in ROUTES)]
    rows = []
    for route in ROUTES if seeds else ():
        for mark in range(MARKS):
            own, trl, dpo = ([found[one, seed]["marks"][mark] for seed in seeds] for one in (route, "trl", "dpo"))
            gain = np.array([np.array(m["reward"]) - start[seed] for m, seed in zip(own, seeds, strict=True)])
            less_trl, less_dpo = less(own, trl), less(own, dpo)
            rows.append(
                {
                    "route": route, "mark": mark + 1, "seeds": len(seeds),
                    "seconds": float(np.mean([m["seconds"] for m in own])),
                    "before_training": float(np.mean([found[route, seed]["before_training"] for seed in seeds])),
                    "step": float(np.mean([m["step"] for m in own])),
                    "gain": crossed(gain).to_dict(),
                    "less_trl": crossed(less_trl).to_dict(),
                    "less_trl_by_seed": less_trl.mean(axis=1).round(4).tolist(),
                    "less_dpo": crossed(less_dpo).to_dict(),
                    "less_dpo_by_seed": less_dpo.mean(axis=1).round(4).tolist(),
                    "kl": float(np.mean([np.mean(m["kl"]) for m in own])),
                }
            )  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/results.md: where each route ends."""
    head = ["route", "CPU seconds", "of them margins and filter", "steps", "judge's gain", "minus trl", "by seed"]
    head += ["minus dpo", "KL"]
    body = []
    for row in rows:
        if row["mark"] == MARKS:
            gain, less_trl, less_dpo = (shown(row[name], "+") for name in ("gain", "less_trl", "less_dpo"))
            seeds = ", ".join(f"{value:+.2f}" for value in row["less_trl_by_seed"])
            cells = [row["route"], f"{row['seconds']:.0f}", f"{row['before_training']:.0f}", f"{row['step']:.0f}", gain]
            cells += ["", ""] if row["route"] == "trl" else [less_trl, seeds]
            cells.append("" if row["route"] == "dpo" else less_dpo)
            body.append([*cells, f"{row['kl']:.1f}"])
    return table(head, body)


def draw_curves(rows: list[dict[str, Any]], target: Path) -> None:
    """Plot the gain in the judge's reward against CPU seconds, a line per route with its intervals."""
    plt = pyplot("whole")
    figure, axis = plt.subplots(figsize=(7, 4.2))
    shades = dict(zip(ROUTES, ("#6e7781", "#0072b2", "#d55e00", "#e69f00"), strict=True))
    for route, shade in shades.items():
        own = [row for row in rows if row["route"] == route]
        low, value, high = np.array([ends(row["gain"]) for row in own]).T
        seconds = [row["seconds"] for row in own]
        axis.errorbar(seconds, value, [value - low, high - value], color=shade, label=route, capsize=2, marker="o")
    axis.axhline(0, color="#b0b7bf", lw=0.8)
    axis.set(xlabel="CPU seconds, everything included", ylabel="judge's reward minus the reference's", xlim=(0, None))
    axis.legend(fontsize=8)
    figure.tight_layout()
    save(figure, target)


def main() -> None:
    """Compute the missing routes, write cells.jsonl, table.json and curves.svg, print the table."""
    parser = options(__doc__, "runs/reproduce-whole")
    others = [route for route in ROUTES if route != "trl"]
    parser.add_argument(
        "--routes", nargs="*", choices=others, default=others, help="without trl, which sets the budget"
    )
    arguments = parser.parse_args()
    configure()
    sizes = Sizes(arguments.pairs, 0.25, 0, arguments.prompts, batch=16, rate=2e-4, max_new_tokens=24)
    study = Study(arguments.assets, arguments.output, sizes, read_known(arguments.known))
    study.output.mkdir(parents=True, exist_ok=True)
    try:
        references, cells = [], []
        for seed in arguments.seeds:
            references.append(run_reference(study, seed))
            budget = None
            for route in ("trl", *arguments.routes):
                cells.append(run_route(study, route, seed, budget))
                budget = cells[-1]["marks"][-1]["seconds"] if route == "trl" else budget
                write_table([*references, *cells], study.output / "cells.jsonl")
    except AlignError as error:
        sys.stderr.write(f"error {error}\n")
        sys.exit(2)
    rows = summarize(cells, references)
    write_json(study.output / "table.json", {"sizes": asdict(study.sizes), "rows": rows})
    draw_curves(rows, study.output / "curves.svg")
    print(markdown(rows))
    log.info("%d routes; %s", len(cells), study.output / "table.json")


if __name__ == "__main__":
    main()
