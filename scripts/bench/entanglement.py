"""Compare gradient products with two full backward passes per pair and with one training step. Prints JSON.

All three see the same pairs of random tokens (half prompt, half response), in turns (A B C A B C), in one process. The
training step is the forward and backward pass of the DPO loss in trl's layout.

    python -m scripts.bench.entanglement --model .assets/smollm2
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from align.entanglement.products import GradientProducts
from align.models.layout import base_model
from align.models.logps import add_completion_head, pair_logps
from align.training.base.arguments import build_lora

SHAPES = ((1, 64), (4, 64), (8, 64), (1, 128), (4, 128), (8, 128), (1, 256), (4, 256), (1, 512), (2, 512))
"""Pairs, tokens per sequence."""
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def load(path: str, lora: bool) -> nn.Module:
    """The model, with an adapter on its attention if ``lora``."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    add_completion_head(model)
    if not lora:
        return model
    from peft import get_peft_model

    return get_peft_model(model, build_lora(LORA, path="lora", task_type="CAUSAL_LM"))


def make_batch(pairs: int, tokens: int, vocabulary: int) -> dict[str, Tensor]:
    """Random pairs in trl's layout."""
    generator = torch.Generator().manual_seed(tokens)
    prompt = torch.randint(10, vocabulary, (pairs, tokens // 2), generator=generator)
    response = torch.randint(10, vocabulary, (2 * pairs, tokens - tokens // 2), generator=generator)
    ids = torch.cat([torch.cat([prompt, prompt]), response], dim=1)
    completion = (torch.arange(tokens) >= tokens // 2).long().expand_as(ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}


def two_backwards(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Inner products of the two gradients [B], by two backward passes for each pair, summed in float64."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pairs = len(batch["input_ids"]) // 2
    found = []
    for k in range(pairs):
        pair = {name: value[[k, k + pairs]] for name, value in batch.items()}
        logps = pair_logps(model, pair, "concatenated")
        chosen = torch.autograd.grad(logps.chosen.sum(), parameters, retain_graph=True)
        rejected = torch.autograd.grad(logps.rejected.sum(), parameters)
        products = [
            [(a * a).sum(dtype=torch.float64), (b * b).sum(dtype=torch.float64), (a * b).sum(dtype=torch.float64)]
            for a, b in zip(chosen, rejected, strict=True)
        ]
        found.append(torch.tensor(products).sum(dim=0)[2])
    return torch.stack(found)


def training_step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Forward and backward pass of the DPO loss with reference log-probs of 0."""
    logps = pair_logps(model, batch, "concatenated")
    loss = -nn.functional.logsigmoid(0.1 * (logps.chosen - logps.rejected)).mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def methods(model: nn.Module) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    """Name -> function that is timed."""
    measure = GradientProducts(model)
    return {
        "products": lambda batch: measure(batch).inner,
        "two backwards": lambda batch: two_backwards(model, batch),
        "training step": lambda batch: training_step(model, batch),
    }


def timed(model: nn.Module, batch: dict[str, Tensor], rounds: int) -> dict[str, object]:
    """Median seconds of each method and the ratio of products to the others."""
    runs = methods(model)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    values = {}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            values[name] = run(batch)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    exact, reference = values["products"], values["two backwards"].double()
    ours = seconds["products"]
    return {
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "two backwards / products": _ratio(seconds["two backwards"], ours),
        "products / training step": _ratio(ours, seconds["training step"]),
        "largest relative difference": float(((exact - reference) / reference).abs().max()),
    }


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def memory(arguments: argparse.Namespace, method: str, shape: str) -> float:
    """MiB that one method adds to the resident memory of a process that holds the model."""
    command = [sys.executable, "-m", "scripts.bench.entanglement", "--model", arguments.model]
    command += ["--shapes", shape, "--memory-of", method]
    done = subprocess.run(command + (["--lora"] if arguments.lora else []), check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def resident(field: str) -> float:
    """MiB of this process: ``VmRSS`` is resident memory now, ``VmHWM`` its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Run the shapes and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".assets/smollm2")
    parser.add_argument("--shapes", nargs="*", default=[f"{pairs}x{tokens}" for pairs, tokens in SHAPES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = load(arguments.model, arguments.lora)
    vocabulary = base_model(model).get_input_embeddings().weight.shape[0]
    results = {}
    for shape in arguments.shapes:
        pairs, tokens = map(int, shape.split("x"))
        batch = make_batch(pairs, tokens, vocabulary)
        if arguments.memory_of:
            run = methods(model)[arguments.memory_of]
            before = resident("VmRSS")
            run(batch)
            print(resident("VmHWM") - before)
            return
        found = timed(model, batch, arguments.rounds)
        if not arguments.no_memory:
            found["added_mib"] = {name: memory(arguments, name, shape) for name in methods(model)}
        results[shape] = found
        print(f"{shape}: {json.dumps(found)}", file=sys.stderr)
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(
        json.dumps(
            {"machine": machine, "torch": torch.__version__, "lora": arguments.lora, "shapes": results}, indent=2
        )
    )


if __name__ == "__main__":
    main()
