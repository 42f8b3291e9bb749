"""What a training would cost: seconds and memory of real steps on the longest pairs, each setting in its own process.

A process of its own, because memory that a library keeps once it was used would be counted for the next setting.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import TrainerCallback

from align.config import TrainSection
from align.config.columns import TEXT
from align.errors import AlignError
from align.io.console import log
from align.training.train import make_trainer

STEPS = 3
"""Optimizer steps of a probe; the first, which allocates, is not timed."""
SHARE = 0.9
"""Of the free memory that a training may take."""
SECONDS = 600
SHARE_OF_FIXED = 0.01
"""If a second pair adds less than this share of the peak, the optimizer sets the peak, not the pairs."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is probed."""

    name: str
    model: str
    lora: bool
    batch: int
    max_length: int
    bf16: bool
    checkpointing: bool = False


def probe_settings(model: str, max_length: int, *, bf16: bool) -> list[Setting]:
    """All weights, an adapter, and an adapter with checkpointing, at one and two pairs a step each."""
    kinds = {"all weights": (False, False), "adapter (LoRA)": (True, False), "adapter, checkpointing": (True, True)}
    return [
        Setting(name, model, lora, batch, max_length, bf16, checkpointing)
        for name, (lora, checkpointing) in kinds.items()
        for batch in (1, 2)
    ]


def probe(pairs: Dataset, settings: list[Setting]) -> list[dict[str, Any]]:
    """Seconds and peak memory of steps under each setting, on copies of the pairs with the most characters.

    Returns:
        For each name of ``settings``: ``seconds_per_pair``, ``bytes_fixed``, ``bytes_per_pair``, ``free`` (bytes) and
        ``largest_batch``, the pairs a step that fit into ``SHARE`` of the free memory (0: not even one). Where the
        optimizer and not the pairs set the peak, ``at_least`` is true and only the probed two are known to fit. Or
        ``problem``, why it could not be measured.
    """
    texts = zip(*(map(str, pairs[name]) for name in TEXT), strict=True)
    longest = max(enumerate(texts), key=lambda one: sum(map(len, one[1])))[0]
    row = {name: pairs[longest][name] for name in TEXT}
    free = _free()
    found = []
    for name in dict.fromkeys(one.name for one in settings):
        first, second = (one for one in settings if one.name == name)
        small = _run(first, row)
        large = small if "problem" in small else _run(second, row)
        if "problem" in large:
            found.append({"name": name, "problem": large["problem"]})
            continue
        each = large["bytes"] - small["bytes"]
        known = each > SHARE_OF_FIXED * small["bytes"]
        fixed = max(small["bytes"] - each, 0) if known else large["bytes"]
        fits = max(int((SHARE * free - fixed) // each), 0) if known else int(large["bytes"] <= SHARE * free) * 2
        found.append({"name": name, "seconds_per_pair": large["seconds"] / 2, "bytes_fixed": fixed,
                      "bytes_per_pair": each if known else None, "free": free, "largest_batch": fits,
                      "at_least": not known})  # fmt: skip
    return found


def _run(setting: Setting, row: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "align.diagnosis.cost"]
    text = json.dumps({"setting": asdict(setting), "row": row})
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"problem": f"{STEPS} steps took more than {SECONDS} seconds"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"problem": last[:200] if done.returncode > 0 else "the process was killed, most likely for its memory"}
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def _free() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


class Clock(TrainerCallback):
    """Keeps the time at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time once the device has finished the step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def measure(setting: Setting, row: dict[str, Any]) -> dict[str, float]:
    """Train ``STEPS`` steps on copies of one pair; peak memory (bytes) of this process and seconds a step."""
    count = STEPS * setting.batch
    pairs = Dataset.from_list([{"id": str(k), **row} for k in range(count)])
    adapter = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"} if setting.lora else None
    fields = {
        "per_device_train_batch_size": setting.batch, "max_steps": STEPS, "max_length": setting.max_length,
        "bf16": setting.bf16, "gradient_checkpointing": setting.checkpointing, "report_to": "none",
    }  # fmt: skip
    section = TrainSection(model=setting.model, methods={"dpo": {"loss": "dpo"}}, peft=adapter, trainer=fields)  # type: ignore[dict-item]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(pairs, section, "dpo", Path(folder), seed=0)
        trainer.add_callback(clock)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    seconds = (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)
    return {"seconds": seconds, "bytes": _peak()}


def _peak() -> float:
    """Bytes at the peak: of the GPU, else resident memory of this process.

    ``ru_maxrss`` would begin at the memory of the process that started this one, which has a model loaded.
    """
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():
        return 1024.0 * next(
            int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def main() -> None:
    """Measure the setting that stands in standard input; print JSON."""
    log.setLevel("ERROR")
    given = json.loads(sys.stdin.read())
    try:
        found: dict[str, Any] = measure(Setting(**given["setting"]), given["row"])
    except AlignError as error:
        found = {"problem": error.message}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
