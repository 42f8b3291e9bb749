"""What measuring gradient entanglement during training costs: seconds per measurement and per step.

One training with `entanglement: {every: 4}` on random pairs; the steps between measurements are timed too, so both come
from the same process and minute. Prints JSON with the share that `every: 50` adds. With --probes 0 every second step
measures its own batch, by its own passes, and the JSON has what this adds to a step. CPU seconds are of this process.

    python -m scripts.bench.entanglement_callback --model .assets/smollm2
    python -m scripts.bench.entanglement_callback --probes 0 --pairs 4 --prompt 32 --completion 32
"""

import argparse
import json
import logging
import random
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.config import EntanglementSection, LossSection, TrainSection
from align.io.files import read_json
from align.training.train import ENTANGLEMENT, attach_probe, make_trainer

EVERY, USUAL = 4, 50
WITHIN = 2
"""Without probes, every so many steps."""
WORDS = (
    "the", "film", "plot", "good", "bad", "slow", "great", "dull", "was", "with", "and", "story", "scene", "not", "end",
)  # fmt: skip
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


class Clock(TrainerCallback):
    """Seconds from the beginning of each optimizer step to its end, before probes are measured."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self._start = self._cpu_start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._start, self._cpu_start = time.monotonic(), time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the seconds of the step."""
        self.seconds.append(time.monotonic() - self._start)
        self.cpu_seconds.append(time.process_time() - self._cpu_start)


def random_pairs(count: int, prompt: int, completion: int) -> Dataset:
    """Pairs of random words, about a token each."""
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(words))

    return Dataset.from_list(
        [
            {"id": str(k), "prompt": text(prompt), "chosen": f" {text(completion)}", "rejected": f" {text(completion)}"}
            for k in range(count)
        ]
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step and of a measurement, and the share that a measurement adds."""
    every = WITHIN if arguments.probes == 0 else EVERY
    config = TrainSection(
        model=arguments.model,
        methods={"dpo": LossSection(loss="dpo")},
        peft=LORA if arguments.lora else None,
        entanglement=EntanglementSection(every=every, probes=arguments.probes),
        layout=arguments.layout,
        trainer={
            "max_steps": arguments.steps, "per_device_train_batch_size": arguments.pairs, "bf16": False,
            "learning_rate": 1e-6, "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True,
            "logging_strategy": "no",
            "save_strategy": "no", "max_length": None,
        },
    )  # fmt: skip
    pairs = random_pairs(arguments.pairs * 2, arguments.prompt, arguments.completion)
    with TemporaryDirectory() as folder:
        trainer = make_trainer(pairs, config, "dpo", Path(folder), seed=0)
        clock = Clock()
        trainer.add_callback(clock)
        attach_probe(trainer, config, Path(folder) / ENTANGLEMENT)
        trainer.train()
        measured = [record["seconds"] for record in read_json(Path(folder) / ENTANGLEMENT)]
    if arguments.probes == 0:
        return within(arguments, clock)
    step = statistics.median(clock.seconds[1:])
    cost = statistics.median(measured)
    return {
        "lora": arguments.lora,
        "step_seconds": step,
        "measurement_seconds": cost,
        "measurements": len(measured),
        f"share_added_at_every_{USUAL}": cost / (USUAL * step),
    }


def within(arguments: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """What the steps that measured their own batch took more than those between them; the first two warm up."""
    found: dict[str, Any] = {name: getattr(arguments, name) for name in ("lora", "pairs", "prompt", "completion")}
    for name, seconds in (("wall", clock.seconds), ("cpu", clock.cpu_seconds)):
        measured, plain = (statistics.median(seconds[first::WITHIN]) for first in (WITHIN, WITHIN + 1))
        shares = [a / b - 1 for a, b in zip(seconds[WITHIN::WITHIN], seconds[WITHIN + 1 :: WITHIN], strict=False)]
        found[name] = {
            "step_seconds": plain, "measured_step_seconds": measured, "share_added": measured / plain - 1,
            "share_added_by_pair_of_steps": [min(shares), max(shares)],
        }  # fmt: skip
    return found


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".assets/smollm2")
    parser.add_argument("--pairs", type=int, default=16, help="pairs per step")
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=24, help="words of a prompt")
    parser.add_argument("--completion", type=int, default=24, help="words of a completion")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--layout", choices=("auto", "concatenated", "shared_prefix"), default="auto")
    parser.add_argument("--lora", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("align").setLevel(logging.ERROR)
    print(json.dumps(measure(arguments), indent=2))


if __name__ == "__main__":
    main()
