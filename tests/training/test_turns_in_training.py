"""Words of others in responses of several messages carry no loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from align.commands.entangle import MEASURED, tokenized
from align.data.pairs import fingerprint
from align.errors import ConfigError
from align.models.loading import load_tokenizer
from align.models.turns import TURNS
from align.training.preference_config import PreferenceConfig
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import causal
from tests.models.test_tokenization import ASKED, BAD, GOOD
from tests.training.test_trainer import BASE

TALK = [*GOOD, {"role": "user", "content": "the plot is not good"}, *BAD]
PAIRS = [
    {"id": "a", "prompt": ASKED, "chosen": TALK, "rejected": BAD},
    {"id": "b", "prompt": ASKED, "chosen": GOOD, "rejected": [*TALK, *TALK[1:]]},
    {"id": "c", "prompt": ASKED, "chosen": TALK, "rejected": GOOD},
]


def trainer(policy: Path, output: Path, **settings: Any) -> PreferenceTrainer:
    args = PreferenceConfig(str(output), precompute_ref_log_probs=True, **BASE | settings)
    return PreferenceTrainer(str(policy), args=args, train_dataset=Dataset.from_list(PAIRS))


@pytest.mark.parametrize("layout", ["concatenated", "shared_prefix"])
@pytest.mark.parametrize("turns", ["assistant", "all", "last"])
def test_log_probs_are_sums_over_the_tokens_that_count(tmp_path: Path, turns: str, layout: str) -> None:
    policy = causal(tmp_path / "policy")
    made = trainer(policy, tmp_path, turns=turns, layout=layout, max_steps=1)
    made.train()
    model, table = AutoModelForCausalLM.from_pretrained(policy), made.train_dataset
    assert ("chosen_mask" in table.column_names) == (turns != "all")
    for row in table:
        for side in ("chosen", "rejected"):
            start, ids = len(row["prompt_ids"]), torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[start - 1 :, 0]
            mask = torch.tensor(row.get(f"{side}_mask") or [1] * len(logps))
            assert row[f"ref_{side}_logps"] == pytest.approx(float((logps * mask).sum()), abs=1e-4)
            text = made.processing_class.decode(ids[0, start:][mask.bool()])
            assert ("plot" in text) == (turns == "all" and len(row[side]) > 1)
    first = made.state.log_history[0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_other_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"PreferenceConfig\.turns: found 'user', expected one of assistant, all, last"
    ):
        PreferenceConfig(str(tmp_path), turns="user", **BASE)


def test_the_key_of_a_measurement_knows_which_tokens_count(tmp_path: Path) -> None:
    """The token ids are the same whatever counts."""
    pairs, found = Dataset.from_list(PAIRS), load_tokenizer(str(causal(tmp_path / "policy")))
    tables = [tokenized(pairs, found, 64, turns)[0] for turns in TURNS]
    keys = [fingerprint(one.select_columns([name for name in MEASURED if name in one.column_names])) for one in tables]
    assert len(set(keys)) == len(TURNS)
