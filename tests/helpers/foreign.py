"""Tiny reward models of many families, as other people save them, and what transformers makes of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from reward_models.score import RewardScorer
from tests.helpers.builders import WORDS, tokenizer

TEXTS = [
    "the film is good",
    "a bad plot",
    "good",
    "the a is was very not great awful fine dull",
    "not bad",
    "good <pad>",
]
SIZE = len(WORDS) + 3
WIDE = {
    "vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3, "eos_token_id": 1,
    "bos_token_id": None,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_neox": {"rotary_pct": 1.0},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 64, "n_positions": 64},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16,
                   "type_vocab_size": 0, "max_relative_positions": -1},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": None, "sep_token_id": None},
}  # fmt: skip
DECODERS = ["llama", "qwen2", "qwen3", "gemma2", "mistral", "gpt2", "opt", "bloom", "gpt_neox", "ctrl", "xlnet"]
ENCODERS = ["bert", "roberta", "deberta", "deberta-v2", "distilbert", "electra", "modernbert"]


def config_of(family: str, **settings: Any) -> PretrainedConfig:
    """A tiny configuration of a family, with one output."""
    known = WIDE | SPECIAL.get(family, {}) | {"pad_token_id": 0, "num_labels": 1}
    if family == "xlnet":
        del known["max_position_embeddings"]  # it has no limit
    return AutoConfig.for_model(family, **(known | settings))


def foreign(folder: Path, family: str = "llama", *, words: Any = None, **settings: Any) -> Path:
    """A reward model of a family as its author might have saved it."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config_of(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder


def by_transformers(folder: Path, ids: list[list[int]]) -> np.ndarray:
    """Each row alone, as transformers' own class scores it."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32").eval()
    with torch.no_grad():
        return np.array([model(input_ids=torch.tensor([row])).logits.item() for row in ids])


def edited(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None], **settings: Any) -> Path:
    """A copy of a model folder with other weights, and other keys of config.json (None: without the key)."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text()) | settings
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def scorer_of(folder: Path, **settings: Any) -> RewardScorer:
    return RewardScorer(folder, **({"batch_tokens": 4096, "max_length": 64} | settings))
