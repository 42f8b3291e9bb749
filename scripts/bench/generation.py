"""Tokens per second of the vLLM and the transformers engine on the same prompts. Prints JSON.

Each engine runs in a separate process; loading and one warm-up call are not timed. Run it with an interpreter that
has vLLM (scripts/assets/setup_vllm.sh makes one):

    .venv-vllm/bin/python -m scripts.bench.generation --prompts 64 --tokens 64
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

from align.generation.engines import make_engine
from align.generation.types import Sampling
from align.generation.vllm_install import vllm_problem

ENGINES = ("transformers", "vllm")
OPENINGS = (
    "The film opens with",
    "I had expected",
    "As a comedy this",
    "The plot, such as it is,",
    "What stays is the",
)


def measure(engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of one engine, for each repeat."""
    start = time.perf_counter()
    options = {"gpu_memory_utilization": arguments.memory} if engine == "vllm" else None
    made = make_engine(engine, arguments.model, batch_size=arguments.batch_size, options=options)  # type: ignore[arg-type]
    loaded = time.perf_counter()
    prompts = [f"Review {k}: {OPENINGS[k % len(OPENINGS)]}" for k in range(arguments.prompts)]
    made.generate(prompts[:4], Sampling(4))
    rates, tokens = [], 0
    for repeat in range(arguments.repeats):
        begin = time.perf_counter()
        found = made.generate(prompts, Sampling(arguments.tokens, seed=repeat))
        seconds = time.perf_counter() - begin
        tokens = sum(len(one.token_ids) for group in found for one in group)
        rates.append(tokens / seconds)
    return {
        "tokens_per_second": rates,
        "median": statistics.median(rates),
        "tokens_of_last_repeat": tokens,
        "seconds_loading": loaded - start,
    }


def main() -> None:
    """Measure both engines, each in a fresh process, and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".assets/smollm2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--memory", type=float, default=0.5, help="share of the memory that vLLM takes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=ENGINES, help="measure one engine in this process")
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(measure(arguments.only, arguments)))
        return
    missing = vllm_problem()
    results: dict[str, Any] = {}
    for engine in ENGINES[:1] if missing else ENGINES:
        command = [sys.executable, "-m", "scripts.bench.generation", *sys.argv[1:], "--only", engine]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[engine] = json.loads(done.stdout.splitlines()[-1])
        print(f"{engine}: {json.dumps(results[engine])}", file=sys.stderr)
    import torch
    import transformers

    settings = {name: value for name, value in vars(arguments).items() if name != "only"}
    machine = {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    ratio = None if missing else results["vllm"]["median"] / results["transformers"]["median"]
    found = {"machine": machine, "settings": settings, "engines": results, "ratio": ratio, "vllm_missing": missing}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
