"""What held-out pairs cost while a policy trains: the rise of the wall time against their share of the tokens.

One training of a random model with an evaluation of 200 pairs every 20 steps; the seconds of steps and of evaluations
come from the same process and minutes. An evaluation has the exact KL, so it reads the vocabulary twice; a step has a
backward pass. The first evaluation also computes the states of the reference. Prints JSON with the rise, the share of
tokens and their difference, which may be at most 3%.

    OMP_NUM_THREADS=1 python -m scripts.bench.held_out
"""

import argparse
import json
import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from align.config import EvalPairsSection, LossSection, TrainSection
from align.training.held_out import HeldOut
from align.training.held_out_trainer import HeldOutTrainer, Watch
from align.training.train import make_trainer
from scripts.bench.entanglement_callback import LORA, WORDS, Clock, random_pairs

PAIRS, EVERY = 200, 20
MOST = 0.03


def write_model(folder: Path, width: int, layers: int, vocabulary: int) -> str:
    """Save a random Llama with a tokenizer of ``WORDS``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = {word: k for k, word in enumerate([*names.values(), *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token=names["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    return str(folder)


class Timed(HeldOutTrainer):
    """Keeps the seconds of every evaluation, with everything that belongs to it."""

    seconds: list[float]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, and note how long it took."""
        start = time.monotonic()
        found = super().evaluate(*args, **kwargs)
        self.seconds.append(time.monotonic() - start)
        return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and tokens of steps and evaluations, and what follows from them."""
    table = random_pairs(PAIRS + arguments.pairs * 16, arguments.prompt, arguments.completion)
    held_out, trained = table.select(range(PAIRS)), table.select(range(PAIRS, len(table)))
    with TemporaryDirectory() as scratch:
        config = TrainSection(
            model=write_model(Path(scratch) / "model", arguments.width, arguments.layers, arguments.vocabulary),
            methods={"dpo": LossSection(loss="dpo")},
            peft=LORA if arguments.lora else None,
            eval_pairs=EvalPairsSection(share=0.5),
            trainer={
                "max_steps": arguments.steps, "per_device_train_batch_size": arguments.pairs, "bf16": False,
                "learning_rate": 1e-5, "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True,
                "eval_steps": EVERY, "per_device_eval_batch_size": arguments.pairs,
            },
        )  # fmt: skip
        watch = Watch(HeldOut.of(Dataset.from_list(held_out.to_list()), seed=0, choose=True))
        trainer: Any = make_trainer(trained, config, "dpo", Path(scratch) / "out", seed=0, watch=watch)
        trainer.__class__, trainer.seconds = Timed, []
        clock = Clock()
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)  # standard output is for the JSON
        trainer.train()
        records = trainer.records
        read = int(trainer._total_train_tokens)
    steps, evaluations = sum(clock.seconds), sum(trainer.seconds)
    share = sum(record["cost"]["tokens"] for record in records) / read
    return {
        "model": {key: getattr(arguments, key) for key in ("width", "layers", "vocabulary", "lora")},
        "steps": len(clock.seconds),
        "step_seconds": steps / len(clock.seconds),
        "evaluations": len(records),
        "evaluation_seconds": [round(one, 4) for one in trainer.seconds],
        "share_of_tokens": share,
        "rise_of_wall_time": evaluations / steps,
        "beyond_the_share": evaluations / steps - share,
        "within": evaluations / steps <= share + MOST,
    }


def main() -> None:
    """Print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a batch")
    parser.add_argument("--prompt", type=int, default=24, help="words")
    parser.add_argument("--completion", type=int, default=24, help="words")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--lora", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    print(json.dumps(measure(arguments), indent=2))


if __name__ == "__main__":
    main()
