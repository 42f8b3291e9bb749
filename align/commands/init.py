"""`align init`: a commented run file for a table of pairs and a model, from what they and the machine are."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import psutil
import torch
import yaml
from datasets import Dataset
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import AutoConfig, AutoModelForCausalLM

from align.config import PairsSection, nearest
from align.data.layouts import guess_columns
from align.data.pairs import CheckResult, check_rows
from align.data.readers import read_rows, read_table
from align.data.sampling import fair_sample
from align.errors import ConfigError, DataError, ModelError
from align.io.files import write_text
from align.models.folders import adapter_base, is_adapter
from align.models.loading import load_tokenizer
from align.models.message_checks import is_conversational
from align.models.positions import context_window
from align.models.tokenization import encode_pair

TEMPLATE = "run.yaml.j2"
Goal = Literal["quality", "speed", "small-memory"]
SAMPLE = 500
"""Pairs whose tokens are counted."""
STEP = 64
"""max_length is a multiple of it."""
QUANTILE = 0.99
FULL_BYTES = 16
"""Bytes per parameter of full training with AdamW: weight, gradient and two moments in float32."""
ACTIVATIONS = 34
"""Bytes in 16 bits per token, layer and hidden unit without checkpointing (arXiv 2205.05198, section 4.1, without the
attention scores, which kernels recompute)."""
SHARE = 0.6
"""Of the free memory that a training may take by this estimate."""
FEWEST_STEPS = 20
"""Optimizer steps per epoch that the batch leaves, at least."""
LARGEST_BATCH = 32
FEWEST_HELD_OUT = 100
"""Pairs from which a tenth is held out of the training."""
FEWEST_FOLDED = 200
"""Pairs below which no reward model is trained on them: its margins would be noise."""
LEARNING_RATES = {"full": 1e-6, "lora": 1e-5}
"""trl's default of DPOConfig, and ten times it for adapters, as trl's documentation advises."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run file is chosen from."""

    pairs: int
    invalid: int
    conversational: bool
    margins: bool
    lengths: np.ndarray
    """Tokens of prompt and longer response, of a sample of the pairs."""
    window: int | None
    """Tokens that the model was made for."""
    parameters: int
    layers: int
    hidden: int
    adapter: bool
    """The model is an adapter, which is trained further."""
    gpu: str
    """Name of the GPU; empty without one."""
    half: bool
    """The device computes in bfloat16."""
    free: int
    """Bytes of free memory on the device."""


def run_file(
    path: str, model: str, *, goal: str = "quality", split: str = "train", columns: dict[str, str] | None = None
) -> str:
    """The text of a run file that trains ``model`` on the pairs at ``path``; comments say why each value is there.

    Args:
        path: as ``pairs.path`` of a run.
        model: folder or hub id of a causal language model.
        goal: quality (full training where it fits), speed (an adapter, no reward model) or small-memory.
        split: as ``pairs.split``.
        columns: name in the pair table -> name in the source; None: by the names that public data use.

    Raises:
        ConfigError: no such goal.
        DataError: the table cannot be read, or holds no pairs.
        ModelError: the model cannot be read.
    """
    if goal not in get_args(Goal):
        raise ConfigError(f"--goal {goal}: not known{nearest(goal, list(get_args(Goal)))}", code="config-option")
    source, checked, notes = _read(path, split, columns)
    facts = _facts(checked, model)
    values = _choose(facts, goal)
    templates = Environment(  # YAML, not HTML: values are quoted by ``_scalar``
        loader=PackageLoader("align.commands"), undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True
    )  # nosec B701
    return templates.get_template(TEMPLATE).render(
        name=_name(path), source=source, model=model, goal=goal, facts=facts, notes=notes, scalar=_scalar, **values
    )


def write_run_file(text: str, file: Path) -> None:
    """Write a run file; an existing one is kept.

    Raises:
        ConfigError: the file exists and holds something else.
    """
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{file}: found another file of this name, which is kept", code="config-file",
                          hint="give another --output")  # fmt: skip
    write_text(file, text)


def _read(path: str, split: str, columns: dict[str, str] | None) -> tuple[PairsSection, CheckResult, tuple[str, ...]]:
    """The source with its columns, its valid and invalid rows, and notes on the mapping."""
    source = PairsSection(path=path, split=split)
    rows = read_rows(source)
    names = {name for row in rows for name in row.values}
    if not rows or not names:
        raise DataError(f"{path}: holds no rows", code="data-empty", hint="expected one pair per row")
    notes: tuple[str, ...] = ()
    if columns is None:
        guess = guess_columns(names)
        if guess.problem:
            raise DataError(
                f"{path}: found {guess.problem}; columns: {', '.join(sorted(names))}",
                code="data-column",
                hint=f"make pairs of it: align pairs from {shlex.quote(path)} --output pairs, then align init "
                "pairs/pairs.parquet; or name the columns: --column chosen=... --column rejected=...",
            )
        columns, notes = guess.columns, guess.notes
    source = PairsSection(path=path, split=split, columns=columns)
    checked = check_rows(*read_table(rows, source), path)
    if not len(checked.pairs):
        problems = "; ".join(str(problem) for problem in checked.problems[:3])
        raise DataError(
            f"{path}: no row is a valid pair: {problems}", code="data-empty", hint="`align data check` lists them"
        )
    return source, checked, notes


def _facts(checked: CheckResult, model: str) -> Facts:
    pairs = checked.pairs
    base = adapter_base(model) or model
    config = _config(base)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    gpu = torch.cuda.is_available()
    return Facts(
        pairs=len(pairs),
        invalid=len(checked.invalid),
        conversational=is_conversational(pairs),
        margins="margin" in pairs.column_names and not any(value is None for value in pairs["margin"]),
        lengths=_lengths(pairs, model),
        window=context_window(empty),
        parameters=sum(one.numel() for one in empty.parameters()),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        adapter=is_adapter(model),
        gpu=torch.cuda.get_device_name() if gpu else "",
        half=gpu and torch.cuda.is_bf16_supported(),
        free=int(torch.cuda.mem_get_info()[0]) if gpu else int(psutil.virtual_memory().available),
    )


def _config(model: str) -> Any:
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"{model}: its configuration cannot be read: {first}", code="model-config") from None


def _lengths(pairs: Dataset, model: str) -> np.ndarray:
    """Tokens of the prompt and the longer response, of a fair sample of the pairs."""
    tokenizer = load_tokenizer(model)
    places, _ = fair_sample(pairs["id"], SAMPLE)
    found = [encode_pair(pairs[k], tokenizer)[:3] for k in places]
    return np.array([len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in found])


def _choose(facts: Facts, goal: str) -> dict[str, Any]:
    """Length, batch, adapter, precision and methods; each is explained in the file."""
    wanted = math.ceil(float(np.quantile(facts.lengths, QUANTILE)) / STEP) * STEP
    length = max(STEP, wanted if facts.window is None else min(wanted, facts.window))
    full = facts.parameters * FULL_BYTES
    fits = full <= SHARE * facts.free
    adapter = not facts.adapter and (goal != "quality" or not fits or not facts.gpu)
    checkpointing = bool(facts.gpu) and (goal == "small-memory" or not fits)
    sixteen = facts.half and goal == "small-memory"
    weights = facts.parameters * ((2 if sixteen else 4) if adapter or facts.adapter else FULL_BYTES)
    per_token = ACTIVATIONS * facts.hidden * (1 if facts.half else 2) * (2 if checkpointing else facts.layers)
    budget = int((SHARE * facts.free - weights) / per_token) // STEP * STEP
    batch = min(LARGEST_BATCH, max(1, facts.pairs // FEWEST_STEPS))
    return {
        "length": length,
        "beyond": float((facts.lengths > length).mean()),
        "median": int(np.median(facts.lengths)),
        "held_out": facts.pairs >= FEWEST_HELD_OUT,
        "batch": 2 ** int(math.log2(batch)),
        "budget": min(max(budget, 2 * length), 65536),
        "tight": budget < 2 * length,
        "lora": adapter,
        "rank": 8 if goal == "small-memory" else 16,
        "full_gib": full / 2**30,
        "free_gib": facts.free / 2**30,
        "checkpointing": checkpointing,
        "sixteen": sixteen,
        "rate": LEARNING_RATES["lora" if adapter or facts.adapter else "full"],
        "reward": not facts.margins and goal == "quality" and facts.pairs >= FEWEST_FOLDED and not facts.adapter,
    }


def _name(path: str) -> str:
    stem = path.rstrip("/").split("/")[-1].split(".")[0]
    kept = "".join(one if one.isalnum() or one in "-_" else "-" for one in stem).strip("-_")
    return kept[:60] or "run"


def _scalar(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()
