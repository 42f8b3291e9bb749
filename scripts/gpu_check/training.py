"""Short trainings of trl's DPOTrainer and of PreferenceTrainer on the same pairs: losses, seconds and memory."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import trl.trainer.dpo_trainer as trl_trainer
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from align.models.loading import load_policy, load_tokenizer
from align.training.base.arguments import build_lora
from align.training.preference_config import PreferenceConfig
from align.training.trainer import PreferenceTrainer
from scripts.gpu_check.cases import Settings

TEXT = "the film was very good and plot is not bad but a review of it was dull great awful fine dull"
WORDS = TEXT.split()
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
KINDS = ("trl", "trl without its fused head", "trl with Liger", "concatenated", "shared_prefix",
         "shared_prefix with Liger")  # fmt: skip
"""Trainer and layout of a training."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a short training gave."""

    losses: list[float]
    """Loss of each step, nats."""
    norms: list[float]
    """Norm of the gradient of each step."""
    seconds: list[float]
    """Wall seconds of each step, the optimizer's included."""
    tokens: int
    """Tokens of a step: prompts once, both responses."""
    peak_gib: float | None
    """Most GPU memory that tensors took, GiB; None without a GPU."""


def pairs(count: int, prompt: int, completion: int) -> Dataset:
    """Pairs of words with these numbers of words; each pair has other words and another length."""

    def text(words: int, offset: int) -> str:
        return " ".join(WORDS[(offset + 7 * k + k * k % 5) % len(WORDS)] for k in range(max(words, 2)))

    return Dataset.from_list(
        [
            {
                "prompt": text(prompt - k % 3, k),
                "chosen": f" {text(completion - k % 4, 3 * k + 1)}",
                "rejected": f" {text(completion - k % 5, 5 * k + 2)}",
            }
            for k in range(count)
        ]
    )


class _Clock(TrainerCallback):
    """Wall seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self._start)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def train(
    kind: str, settings: Settings, *, steps: int, bf16: bool, rate: float = 1e-5, attention: str = "sdpa",
    lora: bool = False,
) -> Run:  # fmt: skip
    """Train ``steps`` steps of DPO, each on all of the same pairs.

    Args:
        kind: one of ``KINDS``.
        settings: model and sizes.
        steps: optimizer steps.
        bf16: mixed precision on float32 weights.
        rate: learning rate, constant.
        attention: attention implementation.
        lora: train an adapter.
    """
    table = pairs(settings.pairs, settings.prompt, settings.completion)
    clock = _Clock()
    with TemporaryDirectory() as folder:
        fields: dict[str, Any] = {
            "output_dir": folder, "per_device_train_batch_size": len(table), "max_steps": steps, "learning_rate": rate,
            "lr_scheduler_type": "constant", "bf16": bf16, "use_cpu": not settings.gpu, "seed": 0, "beta": 0.1,
            "gradient_checkpointing": False, "max_length": None, "report_to": "none", "save_strategy": "no",
            "logging_steps": 1, "disable_tqdm": True, "precompute_ref_log_probs": True,
            "use_liger_kernel": kind.endswith("Liger"),
        }  # fmt: skip
        kinds: dict[str, Callable[..., Any]] = {"trl": DPOTrainer}
        make = kinds.get(kind.split(maxsplit=1)[0], PreferenceTrainer)
        layout: dict[str, Any] = {} if make is DPOTrainer else {"layout": kind.split(maxsplit=1)[0]}
        with _whole_logits() if "without" in kind else _unchanged():
            trainer = make(
                load_policy(settings.model, dtype="float32", attn_implementation=attention),
                args=(DPOConfig if make is DPOTrainer else PreferenceConfig)(**fields, **layout),
                train_dataset=table, processing_class=load_tokenizer(settings.model), callbacks=[clock],
                peft_config=build_lora(LORA, path="lora", task_type="CAUSAL_LM") if lora else None,
            )  # fmt: skip
        if settings.gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if settings.gpu else None
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = sum(len(row[f"{part}_ids"]) for row in trainer.train_dataset for part in ("prompt", "chosen", "rejected"))
    del trainer
    gc.collect()
    return Run(
        [e["loss"] for e in logged], [float(e["grad_norm"]) for e in logged], clock.seconds, tokens, peak
    )  # fmt: skip


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


@contextmanager
def _whole_logits() -> Iterator[None]:
    """Let trl's trainer score all positions with their logits in memory, as it did before its fused head."""
    fused = trl_trainer.add_fused_lm_head
    trl_trainer.add_fused_lm_head = _add_plain_head
    try:
        yield
    finally:
        trl_trainer.add_fused_lm_head = fused


def _add_plain_head(model: Any, **_: Any) -> None:
    model.forward = partial(_plain_forward, model.forward)


def _plain_forward(forward: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
    if not fused_lm_head:
        return forward(*args, **kwargs) if labels is None else forward(*args, labels=labels, **kwargs)
    logits = forward(*args, **kwargs).logits[:, :-1].float()
    scored, ids = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
    logps = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1).masked_fill(~scored, 0)
        top = (logits.argmax(-1) == ids) & scored
    own = logps.gather(-1, ids[..., None]).squeeze(-1).masked_fill(~scored, 0)
    return FusedCausalLMOutput(
        loss=-own.sum() / scored.sum().clamp(min=1), log_probs=own, entropy=entropy, label_mask=scored,
        mean_logits=logits.detach().mean(-1).masked_fill(~scored, 0), is_top1=top,
    )  # fmt: skip


def folder_of(settings: Settings, name: str) -> Path:
    """A folder for what a case writes."""
    made = Path(settings.work) / name
    made.mkdir(parents=True, exist_ok=True)
    return made
