"""Compare one training step of trl's DPOTrainer with one of ours, side by side in one process. Prints JSON.

Both trainers hold the same weights and see the same batches, in turns (A B A B). A step is all that a training does:
``training_step`` (forward, loss, backward, metrics), clipping, AdamW at a rate that leaves the weights as they are, and
the checks of each trainer, with reference log-probs precomputed. Times are CPU seconds of the process, which other work
on the machine changes little, and wall seconds.

    python -m scripts.bench.training --model .assets/smollm2
"""

import argparse
import gc
import json
import logging
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

from align.losses.registry import resolve
from align.training.base.arguments import build_lora
from align.training.columns import add_weight
from align.training.preference_config import own_copy
from align.training.trainer import PreferenceTrainer
from scripts.bench.record import Measure, add_keep, finish

SHAPES = ((16, 24, 16), (32, 64, 8), (128, 64, 4), (256, 64, 4), (256, 256, 2))
"""Prompt tokens, tokens of each completion, pairs per step."""
KINDS = {
    "trl": ("trl", "dpo"),
    "concatenated": ("concatenated", "dpo"),
    "shared_prefix": ("shared_prefix", "dpo"),
    "shared_prefix madpo": ("shared_prefix", "madpo"),
}
"""Name -> layout (or trl's own trainer) and loss; ratios are to the first one selected."""
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def random_pairs(prompt: int, completion: int, pairs: int, vocabulary: int) -> list[dict[str, Any]]:
    """Rows of random token ids of exactly these lengths, in the form of trl's tokenized dataset."""
    generator = torch.Generator().manual_seed(prompt + completion)
    sizes = {"prompt_ids": prompt, "chosen_ids": completion, "rejected_ids": completion}
    return [
        {name: torch.randint(10, vocabulary, (size,), generator=generator).tolist() for name, size in sizes.items()}
        for _ in range(pairs)
    ]


def dialogue_pairs(pairs: int, vocabulary: int) -> list[dict[str, Any]]:
    """Lengths like those of single- and multi-turn dialogue: log-normal, medians 96 and 64 tokens, at most 512."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(pairs):
        row = {}
        for name, median, spread in (("prompt_ids", 96, 0.8), ("chosen_ids", 64, 0.7), ("rejected_ids", 64, 0.7)):
            size = int(median * torch.exp(spread * torch.randn((), generator=generator)))
            row[name] = torch.randint(10, vocabulary, (min(max(size, 4), 512),), generator=generator).tolist()
        rows.append(row)
    return rows


def gemm_peak() -> float:
    """GFLOP per CPU second of a square float32 matrix product, the best of eight."""
    a = torch.randn(2048, 2048)
    best = min(_timed(lambda: a @ a) for _ in range(8))
    return 2 * 2048**3 / best / 1e9


def matmul_rate(model: PreTrainedModel, rows: list[dict[str, Any]], lora: bool) -> float:
    """GFLOP per CPU second of a step's matrix products alone: each linear layer at the tokens that pass through it.

    The products are the output, the gradient of the input and, without an adapter, the gradient of the weight. No step
    made of the same products can be faster on this machine.
    """
    scored = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    tokens = scored + sum(len(row["prompt_ids"]) for row in rows)
    head = model.get_output_embeddings()
    shapes: dict[tuple[int, int, int], int] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            shape = (scored if module is head else tokens, module.in_features, module.out_features)
            shapes[shape] = shapes.get(shape, 0) + 1
    flops = seconds = 0.0
    for (count, inside, outside), times in shapes.items():
        x, w, grad = torch.randn(count, inside), torch.randn(outside, inside), torch.randn(count, outside)
        products = [lambda x=x, w=w: x @ w.T, lambda grad=grad, w=w: grad @ w]
        if not lora:
            products.append(lambda x=x, grad=grad: grad.T @ x)
        for product in products:
            flops += times * 2 * count * inside * outside
            seconds += times * statistics.median(_timed(product) for _ in range(5))
    return flops / seconds / 1e9


def _timed(work: Any) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def build(kind: str, model: str, folder: Path, rows: list[dict[str, Any]], lora: bool, loss: str) -> Any:
    """A trainer of ``model``; its steps take ``batch_of(trainer, rows)``, its dataset is a placeholder."""
    arguments = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=len(rows), beta=0.1, bf16=False, use_cpu=True, seed=0,
        gradient_checkpointing=False, max_length=None, learning_rate=0.0, report_to="none", save_strategy="no",
        disable_tqdm=True, precompute_ref_log_probs=True,
    )  # fmt: skip
    text = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c", "margin": 1.0}] * 2)
    common: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        "args": arguments,
        "processing_class": AutoTokenizer.from_pretrained(model),
        "peft_config": build_lora(LORA, path="lora", task_type="CAUSAL_LM") if lora else None,
    }
    if kind == "trl":
        return DPOTrainer(train_dataset=text.remove_columns("margin"), **common)
    table, bound = add_weight(text, resolve(loss, {}))
    common["args"] = own_copy(arguments, layout=kind)
    return PreferenceTrainer(loss=bound, train_dataset=table, **common)


def batch_of(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The collated rows, with reference log-probs of 0, a margin and a weight."""
    extra = {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
    if isinstance(trainer, PreferenceTrainer):
        extra |= {"margin": 1.0, "weight": 1.0}
    return dict(trainer.data_collator([row | extra for row in rows]))


def step(trainer: Any, batch: dict[str, Any], *, update: bool = False) -> tuple[float, float, float]:
    """CPU seconds, loss and gradient norm of one step from zero gradients; with ``update`` clipping and AdamW count."""
    trainer.model.zero_grad(set_to_none=True)
    trainer.current_gradient_accumulation_steps = 1
    if update and trainer.optimizer is None:
        trainer.create_optimizer()
    items = torch.tensor(len(batch["input_ids"]) // 2)
    found: list[Any] = []

    def work() -> None:
        found.append(trainer.training_step(trainer.model, dict(batch), items))
        if update:
            found.append(trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm))
            if isinstance(trainer, PreferenceTrainer):
                trainer.guard.check_norm(trainer.model, found[-1])
            trainer.optimizer.step()
            if isinstance(trainer, PreferenceTrainer):
                trainer.guard.on_optimizer_step(trainer.args, trainer.state, trainer.control, model=trainer.model)

    seconds = _timed(work)
    if update:
        return seconds, float(found[0]), float(found[1])
    grads = [p.grad.double().norm() for p in trainer.model.parameters() if p.grad is not None]
    return seconds, float(found[0]), float(torch.stack(grads).norm())


def side_by_side(
    kinds: dict[str, tuple[str, str]], model: str, rows: list[dict[str, Any]], lora: bool, rounds: int
) -> dict[str, Any]:
    """CPU seconds of each kind, in turns, and how much their losses and gradient norms differ."""
    with TemporaryDirectory() as folder:
        trainers = {n: build(kind, model, Path(folder) / n, rows, lora, loss) for n, (kind, loss) in kinds.items()}
        batches = {name: batch_of(trainer, rows) for name, trainer in trainers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        losses, norms = {}, {}
        for turn in range(rounds + 1):
            for name, trainer in trainers.items():
                took, losses[name], norms[name] = step(trainer, batches[name], update=True)
                trainer.model.zero_grad(set_to_none=True)
                if turn:
                    seconds[name].append(took)
    first = next(iter(losses))
    ratios = {name: [a / b for a, b in zip(seconds[first], values, strict=True)] for name, values in seconds.items()}
    return {
        "rounds": seconds,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": {name: statistics.median(values) for name, values in ratios.items()},
        "ratios_ci": {name: bootstrap_median(values) for name, values in ratios.items()},
        "loss_difference": {name: abs(losses[name] - losses[first]) for name in losses},
        "gradient_norm_difference": {name: abs(norms[name] / norms[first] - 1) for name in norms},
    }


def bootstrap_median(values: list[float]) -> tuple[float, float]:
    """95% percentile bootstrap interval of the median over the rounds."""
    draws = np.random.default_rng(0).choice(values, size=(2_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), float(high)


def profile(model: str, rows: list[dict[str, Any]], lora: bool) -> dict[str, float]:
    """Operation -> its own share of the time of one shared-prefix step, the ten largest."""
    with TemporaryDirectory() as folder:
        trainer = build("shared_prefix", model, Path(folder), rows, lora, "madpo")
        batch = batch_of(trainer, rows)
        step(trainer, batch)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            step(trainer, batch)
    spent = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    total = sum(spent.values())
    return {name: round(spent[name] / total, 3) for name in sorted(spent, key=lambda name: -spent[name])[:10]}


def peak_memory(kind: str, model: str, rows_file: Path, lora: bool) -> dict[str, float]:
    """MiB of resident memory before one step and at its peak, in a separate process."""
    command = [sys.executable, "-m", "scripts.bench.training", "--model", model, "--memory-of", kind]
    command += ["--rows", str(rows_file)]
    done = subprocess.run(command + (["--lora"] if lora else []), check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_memory(kind: str, model: str, rows: list[dict[str, Any]], lora: bool) -> dict[str, float]:
    """See ``peak_memory``; runs in the child process."""
    with TemporaryDirectory() as folder:
        trainer = build(kind, model, Path(folder), rows, lora, "madpo")
        batch = batch_of(trainer, rows)
        gc.collect()
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        step(trainer, batch)
    high = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"before": before, "peak": int(high.split()[1]) / 1024}


def body_and_head(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters that multiply every token, and those of the output head; embeddings are only looked up."""
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    tied = embedding.data_ptr() == head.data_ptr()
    total = sum(p.numel() for p in model.parameters())
    return total - embedding.numel() - (0 if tied else head.numel()), head.numel()


def useful_flops(model: PreTrainedModel, rows: list[dict[str, Any]], lora: bool) -> float:
    """FLOPs that the loss needs: prompts once, the head at completions only, the causal half of attention."""
    config = model.config
    body, head = body_and_head(model)
    factor = 4 if lora else 6
    total = 0.0
    for row in rows:
        prompt, *sides = (len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        total += factor * body * (prompt + sum(sides)) + factor * head * sum(sides)
        pairs_of_tokens = prompt**2 / 2 + sum(side * prompt + side**2 / 2 for side in sides)
        total += 6 * 2 * config.num_hidden_layers * config.hidden_size * pairs_of_tokens
    return total


def padded_flops(model: PreTrainedModel, rows: list[dict[str, Any]], lora: bool) -> float:
    """FLOPs of the same step on padded rows [2B, T], with the head and attention at every position."""
    config = model.config
    longest = max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows)
    tokens = 2 * len(rows) * longest
    attention = 6 * 2 * config.num_hidden_layers * config.hidden_size * tokens * longest / 2
    return (4 if lora else 6) * sum(body_and_head(model)) * tokens + attention


def rows_of(shape: str, vocabulary: int) -> list[dict[str, Any]]:
    """The pairs of ``16/24``, ``16/24x8`` (eight of them) or ``dialogue``."""
    lengths, _, given = shape.partition("x")
    if lengths == "dialogue":
        return dialogue_pairs(int(given or 4), vocabulary)
    prompt, completion = map(int, lengths.split("/"))
    usual = next((n for p, c, n in SHAPES if (p, c) == (prompt, completion)), 4)
    return random_pairs(prompt, completion, int(given or usual), vocabulary)


def main() -> None:
    """Run the shapes and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".assets/smollm2")
    told = "prompt/completion, or prompt/completionxpairs; dialogue; default pairs: as SHAPES has them, or 4"
    parser.add_argument("--shapes", nargs="*", help=told, default=[f"{p}/{c}" for p, c, _ in SHAPES] + ["dialogue"])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=["trl", "concatenated", "shared_prefix"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--profile", action="store_true", help="only show where a step's time goes")
    add_keep(parser)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for logger in ("align", "httpx"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    if arguments.memory_of:
        rows = json.loads(arguments.rows.read_text())
        print(json.dumps(measure_memory(arguments.memory_of, arguments.model, rows, arguments.lora)))
        return
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    kinds = {name: KINDS[name] for name in arguments.kinds}
    results: dict[str, Any] = {}
    for shape in arguments.shapes:
        rows = rows_of(shape, vocabulary)
        if arguments.profile:
            results[shape] = profile(arguments.model, rows, arguments.lora)
            continue
        peak = gemm_peak()
        found = side_by_side(kinds, arguments.model, rows, arguments.lora, arguments.rounds)
        found["pairs"] = len(rows)
        found["gemm_gflops"] = peak
        found["own_products_gflops"] = matmul_rate(model, rows, arguments.lora)
        flops = useful_flops(model, rows, arguments.lora)
        found["flops_of_padded_rows_over_needed"] = padded_flops(model, rows, arguments.lora) / flops
        found["utilization"] = {name: flops / took / 1e9 / peak for name, took in found["seconds"].items()}
        if not arguments.no_memory:
            with TemporaryDirectory() as folder:
                file = Path(folder) / "rows.json"
                file.write_text(json.dumps(rows))
                found["memory_mib"] = {
                    kind: peak_memory(kind, arguments.model, file, arguments.lora)
                    for kind in {KINDS[name][0]: None for name in arguments.kinds}
                }
        results[shape] = found
        print(f"{shape}: {json.dumps(found)}", file=sys.stderr)
    versions = {"torch": torch.__version__, "trl": version("trl"), "transformers": version("transformers")}
    measures = measures_of(results) if not arguments.profile else {}
    finish("training-lora" if arguments.lora else "training", {"versions": versions, "shapes": results}, measures,
           arguments)  # fmt: skip


def measures_of(results: dict[str, Any]) -> dict[str, Measure]:
    """The rounds of every shape: CPU seconds of each kind, their ratios to the first, and added memory."""
    measures = {}
    for shape, found in results.items():
        first, *others = found["rounds"].items()
        for name, values in others:
            measures[f"{shape}: {name}"] = Measure(values, "s")
            ratios = [a / b for a, b in zip(values, first[1], strict=True)]
            measures[f"{shape}: {name} / {first[0]}"] = Measure(ratios, "ratio")
        for name, memory in found.get("memory_mib", {}).items():
            measures[f"{shape}: memory added by {name}"] = Measure([memory["peak"] - memory["before"]], "MiB")
    return measures


if __name__ == "__main__":
    main()
