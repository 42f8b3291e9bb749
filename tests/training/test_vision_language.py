"""Text-only pairs on a model that reads images too: trl's losses, one policy everywhere, no limit by its patches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from trl import DPOConfig, DPOTrainer

from align import PreferenceConfig, PreferenceTrainer, measure_entanglement
from align.generation.transformers_engine import TransformersEngine
from align.generation.types import Sampling
from align.models.loading import load_merged_policy, load_policy, load_tokenizer
from align.models.positions import context_window, learned_positions
from tests.helpers.builders import rows, tokenizer
from tests.training.test_adapters import CLOSE, difference, plain

PAIRS = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows(12)])
PATCHES = 4


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 with a vision tower of four patches, and a sliding window."""
    folder = tmp_path_factory.mktemp("gemma")
    torch.manual_seed(0)
    part = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = part | {
        "vocab_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = part | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63, boi_token_index=61,
        eoi_token_index=62,
    )  # fmt: skip
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def trained(trainer: type, kind: type, model: Path, folder: Path, adapter: bool, **more: Any) -> Any:
    args = kind(
        str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, bf16=False, use_cpu=True,
        report_to="none", logging_steps=1, save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, **more,
    )  # fmt: skip
    peft = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)") if adapter else None
    torch.manual_seed(1)
    found = trainer(str(model), args=args, train_dataset=PAIRS, processing_class=tokenizer(), peft_config=peft)
    found.train()
    return found


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("layout", ["concatenated", "shared_prefix"])
def test_losses_are_those_of_trl(gemma: Path, tmp_path: Path, adapter: bool, layout: str) -> None:
    ours = trained(PreferenceTrainer, PreferenceConfig, gemma, tmp_path / "ours", adapter, layout=layout)
    trls = trained(DPOTrainer, DPOConfig, gemma, tmp_path / "trl", adapter)
    losses = [[row["loss"] for row in one.state.log_history if "loss" in row] for one in (ours, trls)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][2] != pytest.approx(losses[0][0], abs=1e-4)
    ours.save_model(str(tmp_path / "model"))
    folder, words = str(tmp_path / "model"), load_tokenizer(str(tmp_path / "model"))
    now = plain(ours.model)
    assert difference(plain(load_policy(folder, dtype="float32")), now) < CLOSE
    sampled = load_merged_policy(folder, dtype="float32")
    assert difference(plain(sampled), now) < CLOSE
    (completion,) = next(iter(TransformersEngine(sampled, words, batch_size=1).stream(["good film"], Sampling(3))))[1]
    assert 0 < len(completion.token_ids) <= 3
    table = measure_entanglement(load_policy(folder, dtype="float32", trainable=True), words, PAIRS.select(range(3)))
    assert len(table) == 3


def test_patches_are_no_positions_of_the_text(gemma: Path) -> None:
    model = load_policy(str(gemma))
    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == PATCHES]
    assert embeddings and learned_positions(model) is None
    assert context_window(model) == model.config.get_text_config().max_position_embeddings
