"""A whole job as a user of trl, transformers and VADER would write it: one script, one process. Prints JSON.

Reward model with trl.RewardTrainer, its scores with a pipeline, the policy with trl.DPOTrainer, completions with
``generate``, verdicts with VADER and the reward model. scripts/bench/job.py runs it and the same job with this program.

``--best`` takes the settings that are fastest on a CPU: no gradient checkpointing, reference log-probs computed before
the training, batches of similar length wherever the order is free, and a larger batch to generate.

    python -m scripts.bench.job_trl FOLDER --policy .assets/smollm2 --reward .assets/minilm --tokens 24 --best
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline, set_seed
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

COMMON = {"num_train_epochs": 1, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "bf16": False,
          "use_cpu": True, "disable_tqdm": True, "seed": 0}  # fmt: skip


GROUPED = {
    "gradient_checkpointing": False,
    "train_sampling_strategy": "group_by_length",
    "remove_unused_columns": False,
}


class Clock:
    """CPU and wall seconds of each stage of the script."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self.last = (0.0, 0.0)
        self.begun = time.perf_counter()

    def stage(self, name: str) -> None:
        """End the stage ``name``: what passed since the last one ended."""
        now = (time.process_time(), time.perf_counter() - self.begun)
        self.stages[name] = {"cpu": now[0] - self.last[0], "wall": now[1] - self.last[1]}
        self.last = now


def pairs_of(file: Path, best: bool) -> Dataset:
    """The pairs of a file; with their lengths if batches are to be of similar length."""
    pairs = Dataset.from_json(str(file)).remove_columns("id")
    if not best:
        return pairs
    return pairs.add_column("length", [sum(map(len, row.values())) for row in pairs])


def train_reward(folder: Path, model: str, best: bool) -> None:
    """Fine-tune a classifier with one logit on pairs."""
    config = RewardConfig(
        str(folder / "trl-reward"), per_device_train_batch_size=16, learning_rate=5e-5, max_length=512,
        **COMMON, **(GROUPED if best else {}),
    )  # fmt: skip
    pairs = pairs_of(folder / "reward_pairs.jsonl", best)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token  # the trainer ends every text with it
    set_seed(0)
    trainer = RewardTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


def score(folder: Path, texts: list[str], best: bool) -> list[float]:
    """Rewards of whole texts by a pipeline."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "trl-reward", dtype=torch.float32)
    scorer = pipeline(
        "text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder / "trl-reward")
    )
    order = sorted(range(len(texts)), key=lambda k: len(texts[k])) if best else range(len(texts))
    found = scorer([texts[k] for k in order], batch_size=16, function_to_apply="none", truncation=True, max_length=512)
    scores = dict(zip(order, (row["score"] for row in found), strict=True))
    return [scores[k] for k in range(len(texts))]


def train_policy(folder: Path, model: str, best: bool) -> list[float]:
    """DPO on all parameters; the losses of its steps."""
    faster = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 4, **GROUPED}
    config = DPOConfig(str(folder / "trl-policy"), per_device_train_batch_size=4, **COMMON, **(faster if best else {}))
    pairs = pairs_of(folder / "pairs.jsonl", best)
    set_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = DPOTrainer(
        policy, args=config, train_dataset=pairs, processing_class=AutoTokenizer.from_pretrained(model)
    )
    trainer.train()
    trainer.save_model()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def generate(model: str, prompts: list[str], tokens: int, best: bool) -> tuple[list[str], int]:
    """Greedy completions of the prompts, and the number of their tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    size = 64 if best else 16
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k])) if best else list(range(len(prompts)))
    texts, count = {}, 0
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        inputs = tokenizer([prompts[k] for k in rows], return_tensors="pt", padding=True)
        with torch.no_grad():
            made = policy.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        new = made[:, inputs["input_ids"].shape[1] :]
        for k, row in zip(rows, new, strict=True):
            ends = (row == tokenizer.eos_token_id).nonzero()
            ids = row[: int(ends[0]) + 1] if len(ends) else row
            count += len(ids)
            texts[k] = tokenizer.decode(ids, skip_special_tokens=True)
    return [texts[k] for k in range(len(prompts))], count


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Run the job and print its stages and results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--best", action="store_true")
    arguments = parser.parse_args()
    folder, best, clock = arguments.folder, arguments.best, Clock()
    clock.stage("start")
    train_reward(folder, arguments.reward, best)
    clock.stage("reward model")
    pairs, heldout = rows_of(folder, "pairs.jsonl"), rows_of(folder, "heldout.jsonl")
    sides = [row["prompt"] + row[side] for row in [*pairs, *heldout] for side in ("chosen", "rejected")]
    scores = score(folder, sides, best)
    margins = [a - b for a, b in zip(scores[::2], scores[1::2], strict=True)]
    clock.stage("scores")
    losses = train_policy(folder, arguments.policy, best)
    clock.stage("policy")
    prompts = [row["prompt"] for row in rows_of(folder, "prompts.jsonl")]
    models = {"reference": arguments.policy, "policy": str(folder / "trl-policy")}
    made = {name: generate(model, prompts, arguments.tokens, best) for name, model in models.items()}
    clock.stage("completions")
    lexicon = SentimentIntensityAnalyzer()
    judged = {
        name: [3 * lexicon.polarity_scores(p + text)["compound"] for p, text in zip(prompts, texts, strict=True)]
        for name, (texts, _) in made.items()
    }
    rewards = {
        name: score(folder, [p + text for p, text in zip(prompts, texts, strict=True)], best)
        for name, (texts, _) in made.items()
    }
    clock.stage("judge")
    results = {
        "heldout_accuracy": sum(margin > 0 for margin in margins[len(pairs) :]) / len(heldout),
        "losses": losses,
        "new_tokens": {name: count for name, (_, count) in made.items()},
        "reference_texts": made["reference"][0],
        "judge": {name: sum(values) / len(values) for name, values in judged.items()},
        "reward": {name: sum(values) / len(values) for name, values in rewards.items()},
    }
    print(json.dumps({"stages": clock.stages, "results": results}))


if __name__ == "__main__":
    main()
