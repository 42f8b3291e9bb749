"""Several processes (DDP, FSDP2) train as one does, and an adapter on a 4-bit base trains."""

import json
import math
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from align.training.trainer import PreferenceTrainer
from scripts.gpu_check.cases import Case, Settings, judge, need
from scripts.gpu_check.training import LORA, folder_of
from scripts.gpu_check.worker import losses_of, make_trainer

ROOT = Path(__file__).parents[2]
FSDP2 = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
STEPS = 3
SECONDS = 1200
"""Most seconds of one training in several processes."""
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}


def cases() -> dict[str, Case]:
    """Name -> case."""
    return {
        "DDP, all weights": partial(_as_one_process, sharded=False, lora=False),
        "DDP, adapter": partial(_as_one_process, sharded=False, lora=True),
        "FSDP2, all weights": partial(_as_one_process, sharded=True, lora=False),
        "FSDP2, adapter": partial(_as_one_process, sharded=True, lora=True),
        "QLoRA": _qlora,
    }


def count(sharded: bool) -> int:
    """Processes to start: one per GPU, or two on a CPU.

    Raises:
        NotHere: there is no GPU for FSDP2, or only one for DDP.
    """
    gpus = torch.cuda.device_count()
    need(gpus > 0 or not sharded, "FSDP2 needs a GPU")
    need(gpus != 1 or sharded, "DDP needs 2 GPUs or more, found 1")
    return gpus or 2


def _as_one_process(settings: Settings, *, sharded: bool, lora: bool) -> dict[str, Any]:
    """The losses of ``STEPS`` steps in float32 are those of one process, whatever the number of processes."""
    number = count(sharded)
    need(settings.pairs % number == 0, f"--pairs {settings.pairs} cannot be shared by {number} processes")
    folder = folder_of(settings, f"processes-{'fsdp2' if sharded else 'ddp'}-{'lora' if lora else 'full'}")
    one = _losses(settings, folder / "one", ["-m"], lora)
    kind = ["--config_file", str(FSDP2)] if sharded else ["--multi_gpu"]
    launch = ["-m", "accelerate.commands.launch", *kind, "--num_machines", "1", "--num_processes", str(number),
              "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]  # fmt: skip
    many = _losses(settings, folder / "many", launch, lora)
    apart = max(abs(a - b) for a, b in zip(one, many, strict=True))
    return judge({"processes": number, "one": one, "many": many, "loss": apart}, {"loss": 1e-3})


def _losses(settings: Settings, folder: Path, launch: list[str], lora: bool) -> list[float]:
    folder.mkdir(parents=True, exist_ok=True)
    settings.save(folder / "settings.json")
    command = [sys.executable, *launch, "scripts.gpu_check.worker", str(folder), *(["--lora"] if lora else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        errors = [line for line in lines if "Error" in line]
        raise RuntimeError(f"{' '.join(launch)} ended with {done.returncode}: {(errors or lines or [''])[-1]}")
    losses: list[float] = json.loads((folder / "losses.json").read_text())
    return losses


def _qlora(settings: Settings) -> dict[str, Any]:
    """An adapter on a 4-bit base: see ``adapter_alone``."""
    need(settings.gpu, "4-bit weights need a GPU")
    need(find_spec("bitsandbytes") is not None, "the package bitsandbytes is not installed")
    folder = folder_of(settings, "qlora")
    quantized = {"dtype": "bfloat16", "quantization_config": FOUR_BITS}
    trainer = make_trainer(settings, folder, steps=2 * STEPS, lora=LORA, loading=quantized, rate=1e-3, bf16=True)
    return adapter_alone(trainer)


def adapter_alone(trainer: PreferenceTrainer) -> dict[str, Any]:
    """Train an adapter: its losses fall and stay finite, and no byte of its base changes.

    Raises:
        Wrong: they do not.
    """
    frozen = {name: w.detach().cpu().clone() for name, w in trainer.model.named_parameters() if not w.requires_grad}
    losses = losses_of(trainer)
    now = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    changed = sum(not torch.equal(now[name].detach().cpu(), before) for name, before in frozen.items())
    fell = losses[-1] - losses[0] if all(map(math.isfinite, losses)) else math.nan
    numbers = {"losses": losses, "change of the loss": fell, "frozen": len(frozen), "frozen and changed": changed}
    return judge(numbers, {"change of the loss": 0.0, "frozen and changed": 0})
