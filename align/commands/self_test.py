"""What `align doctor` tries on a machine: four small exactness checks on a random model of two layers."""

import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.entanglement.directional import gradient_of
from align.entanglement.products import GradientProducts
from align.generation.transformers_engine import TransformersEngine
from align.generation.types import Sampling
from align.io.console import log
from align.models.collator import PairCollator
from align.models.layout import HALF_TOLERANCE, TOLERANCE, choose_layout
from align.models.loading import load_policy, load_tokenizer
from align.models.logps import add_completion_head, pair_logps

WORDS = [
    "the",
    "film",
    "was",
    "a",
    "good",
    "bad",
    "dull",
    "great",
    "fine",
    "plot",
    "and",
    "its",
    "end",
    "we",
    "liked",
    "it",
]
ROWS = [
    {"prompt": "the film was", "chosen": " a great film and we liked it", "rejected": " a dull film"},
    {"prompt": "we liked", "chosen": " the plot", "rejected": " its bad end and the dull plot"},
    {"prompt": "a good plot", "chosen": " and a fine end", "rejected": " and a bad end"},
    {"prompt": "it was", "chosen": " good", "rejected": " bad and dull and bad"},
]
RELATIVE = 1e-4
"""Largest difference, relative to the size of the number, that rounding in float32 explains here."""


def self_test(device: str, dtype: str) -> Iterator[dict[str, Any]]:
    """Run the checks one by one; a check that fails or raises does not stop the others.

    Args:
        device: ``cpu``, ``cuda`` or ``mps``.
        dtype: name of the dtype that a training would use, such as ``bfloat16``.

    Yields:
        For each check its ``name``, whether it is ``ok``, what was ``found`` and what was ``expected``.
    """
    checks: dict[str, Callable[[Path, torch.device, torch.dtype], tuple[float, float]]] = {
        "log-probs of both layouts equal one plain forward pass": _layouts,
        "one DPO step equals trl's": _dpo_step,
        "gradient products equal autograd's": _products,
        "greedy completions do not depend on the batch size": _generation,
    }
    with tempfile.TemporaryDirectory() as folder, _seeded():
        with _silent():
            model = make_model(Path(folder))
        for name, check in checks.items():
            try:
                with _silent():
                    found, limit = check(model, torch.device(device), getattr(torch, dtype))
                result = {"ok": bool(found <= limit), "found": f"{found:.2g}", "expected": f"at most {limit:.2g}"}
            except Exception as error:
                first = (str(error).splitlines() or [""])[0]
                result = {"ok": False, "found": f"{type(error).__name__}: {first}", "expected": "no error"}
            yield {"name": name} | result


@contextmanager
def _silent() -> Iterator[None]:
    """Keep metrics and progress bars of the libraries off the terminal."""
    level = log.level
    log.setLevel("ERROR")
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def make_model(folder: Path) -> Path:
    """A random Llama and a word tokenizer, saved as a model folder."""
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = {word: k for k, word in enumerate([*names.values(), *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=names["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _batch(folder: Path, device: torch.device) -> dict[str, Any]:
    tokenizer = load_tokenizer(str(folder))
    end = [tokenizer.eos_token_id]
    rows = [
        {"prompt_ids": tokenizer(row["prompt"])["input_ids"]}
        | {f"{side}_ids": tokenizer(row[side])["input_ids"] + end for side in ("chosen", "rejected")}
        for row in ROWS
    ]
    collated = PairCollator(pad_token_id=0)(rows)
    return {name: value.to(device) for name, value in collated.items() if isinstance(value, torch.Tensor)}


def _layouts(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Largest difference (nats a token) of either layout from log_softmax of the model's own logits."""
    model = load_policy(str(folder), dtype=str(dtype).removeprefix("torch.")).to(device).eval()
    batch = _batch(folder, device)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
        scored = batch["completion_mask"][:, 1:]
        true = (logps * scored).sum(dim=1).view(2, -1)
        lengths = scored.sum(dim=1).view(2, -1)
        choose_layout(model, batch, "shared_prefix")
        differences = []
        for layout in ("concatenated", "shared_prefix"):
            found = pair_logps(model, batch, layout)
            differences.append(((torch.stack([found.chosen, found.rejected]) - true).abs() / lengths).max())
    return float(torch.stack(differences).max()), TOLERANCE.get(dtype, HALF_TOLERANCE)


def _dpo_step(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Largest difference of a weight after one step of trl's DPOTrainer and of this program's, relative to the step."""
    from trl import DPOConfig, DPOTrainer

    from align.training.preference_config import PreferenceConfig
    from align.training.trainer import PreferenceTrainer

    common: dict[str, Any] = {
        "per_device_train_batch_size": len(ROWS), "max_steps": 1, "learning_rate": 0.1, "optim": "sgd",
        "report_to": "none", "save_strategy": "no", "bf16": dtype is torch.bfloat16, "fp16": False,
        "use_cpu": device.type == "cpu", "gradient_checkpointing": False, "disable_tqdm": True, "seed": 0,
        "model_init_kwargs": {"dtype": "float32"}, "logging_strategy": "no",
    }  # fmt: skip
    before = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    moved = []
    with tempfile.TemporaryDirectory() as output:
        for trainer, config in ((DPOTrainer, DPOConfig), (PreferenceTrainer, PreferenceConfig)):
            one = trainer(str(folder), args=config(output, **common), train_dataset=Dataset.from_list(ROWS))
            one.train()
            after = {name: value.detach().float().cpu() for name, value in one.model.state_dict().items()}
            moved.append(torch.cat([(after[name] - before[name]).flatten() for name in before]))
    theirs, ours = moved
    limit = RELATIVE if dtype is torch.float32 else HALF_TOLERANCE
    return float((ours - theirs).norm() / theirs.norm()), limit


def _products(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Largest error of <gw, gl>, |gw|^2 and |gl|^2, relative to |gw| |gl|, in float32 as they are always measured."""
    model = load_policy(str(folder), dtype="float32").to(device).eval()
    batch = _batch(folder, device)
    found = GradientProducts(model)(batch)
    add_completion_head(model)
    weights = dict(model.named_parameters())
    worst = 0.0
    for k in range(len(ROWS)):
        both = pair_logps(model, batch, "concatenated")
        gw, gl = (gradient_of(side[k], weights) for side in (both.chosen, both.rejected))
        flat = [torch.cat([grad[name].double().flatten() for name in weights]) for grad in (gw, gl)]
        scale = float(flat[0].norm() * flat[1].norm())
        true = (flat[0] @ flat[0], flat[1] @ flat[1], flat[0] @ flat[1])
        own = (found.chosen_sq[k], found.rejected_sq[k], found.inner[k])
        worst = max(worst, *(abs(float(a) - float(b)) / scale for a, b in zip(own, true, strict=True)))
    return worst, 1e-3


def _generation(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Number of prompts whose greedy completion differs between batches of one and one batch of all."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = load_tokenizer(str(folder))
    prompts, sampling = [row["prompt"] for row in ROWS], Sampling(8, temperature=0.0)
    texts = []
    for size in (1, len(prompts)):
        engine = TransformersEngine(model, tokenizer, batch_size=size)
        texts.append([group[0].text for group in engine.generate(prompts, sampling)])
    return float(sum(a != b for a, b in zip(*texts, strict=True))), 0.0
