"""The learned token mask: its loss by hand, what it learns, its state in checkpoints."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from align.config import LossSection, TokenMaskSection, TrainSection
from align.errors import ConfigError
from align.io.files import read_json
from align.losses.registry import resolve
from align.models.logps import pair_logps
from align.training.token_mask import OPEN, TokenMask
from align.training.train import make_trainer, train_policy
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import WORDS, rows
from tests.training.test_trainer import FIELDS

IDS = torch.tensor([[5, 6, 7, 0], [5, 8, 0, 0]])
COMPLETION = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]])
POLICY = torch.tensor([[-1.0, -2.0, 0.0], [-4.0, 0.0, 0.0]])
REFERENCE = torch.tensor([[-1.5, -3.0, 0.0], [-3.0, 0.0, 0.0]])


def mask(sparsity: float = 0.2) -> TokenMask:
    return TokenMask(10, TokenMaskSection(sparsity=sparsity), Accelerator(cpu=True))


def test_masked_sums_and_price_by_hand() -> None:
    """Chosen tokens 6 and 7, rejected token 8; the weight of token 6 is 0."""
    token_mask = mask()
    with torch.no_grad():
        token_mask.logit[6] = -100.0
    masked, price, weight = token_mask(POLICY, REFERENCE, IDS, COMPLETION)
    m = 1 / (1 + math.exp(-OPEN))
    assert masked.chosen.tolist() == pytest.approx([-2.0 * m]) and masked.ref_chosen.tolist() == pytest.approx(
        [-3.0 * m]
    )
    assert masked.rejected.tolist() == pytest.approx([-4.0 * m])
    assert (masked.chosen_length.tolist(), masked.rejected_length.tolist()) == ([2.0], [1.0])
    assert weight.tolist() == pytest.approx([m / 2, m])
    assert price.tolist() == pytest.approx([0.2 * (m / 2 + m) / 2])


def test_the_weight_of_a_shared_token_falls_and_that_of_a_separating_token_stays() -> None:
    """Token 6 has the same log-ratio in both responses, token 7 raises and token 8 lowers the margin."""
    token_mask = mask(sparsity=0.05)
    ids, completion = torch.tensor([[5, 6, 7], [5, 6, 8]]), torch.tensor([[0, 1, 1], [0, 1, 1]])
    policy, reference = torch.tensor([[-1.0, -2.0], [-1.0, -6.0]]), torch.tensor([[-3.0, -4.0], [-3.0, -4.0]])
    loss = resolve("dpo", {"beta": 1.0})
    for _ in range(100):
        masked, price, _ = token_mask(policy, reference, ids, completion)
        (loss(masked, None) + price).sum().backward()
        token_mask.step()
    weight = torch.sigmoid(token_mask.logit)
    assert float(weight[6]) < 0.2 < 0.6 < float(weight[7])
    assert float(weight[8]) > 0.6 and float(weight[3]) == pytest.approx(1 / (1 + math.exp(-OPEN)))
    assert {token for token, _ in token_mask.extremes(5)["closed"]} == {6, 7, 8}


def trainer(policy: Path, output: Path, steps: int, **more: Any) -> PreferenceTrainer:
    fields = (
        FIELDS | {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"} | more
    )
    masked = LossSection(loss="dpo", token_mask=TokenMaskSection())
    config = TrainSection(model=str(policy), methods={"m": masked}, trainer=fields)
    return make_trainer(Dataset.from_list(rows(16)), config, "m", output, seed=0)


def test_resumed_equals_uninterrupted(tiny_policy: Path, tmp_path: Path) -> None:
    """Bitwise, the mask and its optimizer included."""
    full = trainer(tiny_policy, tmp_path / "full", 4)
    full.train()
    trainer(tiny_policy, tmp_path / "stopped", 2).train()
    second = trainer(tiny_policy, tmp_path / "stopped", 4)
    second.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoints" / "checkpoint-2"))
    assert full.token_mask is not None and second.token_mask is not None
    assert torch.equal(full.token_mask.logit, second.token_mask.logit)
    assert not torch.equal(full.token_mask.logit, torch.full_like(full.token_mask.logit, OPEN))
    assert all(torch.equal(value, second.model.state_dict()[name]) for name, value in full.model.state_dict().items())


def test_the_reference_of_a_full_fine_tuning_does_not_move(tiny_policy: Path, tmp_path: Path) -> None:
    subject = trainer(tiny_policy, tmp_path / "m", 4)
    subject.train()
    assert subject.state.log_history[3]["loss"] < subject.state.log_history[0]["loss"] - 0.05
    batch = subject.data_collator([subject.train_dataset[k] for k in range(4)])
    fresh = trainer(tiny_policy, tmp_path / "fresh", 4)
    fresh.model.eval()
    with torch.no_grad():
        start = pair_logps(fresh.model, batch, fresh.layout).tokens.logps
    assert torch.allclose(subject.run_reference(batch).tokens.logps, start, atol=1e-5)
    with pytest.raises(ConfigError, match="precompute_ref_log_probs: found true together with a token_mask"):
        trainer(tiny_policy, tmp_path / "x", 4, precompute_ref_log_probs=True)


@pytest.mark.parametrize("live", [{"token_mask": TokenMaskSection()}, {}])
def test_bfloat16_with_a_reference_model(live: dict[str, Any], tiny_policy: Path, tmp_path: Path) -> None:
    """Under autocast, too, the start is its own reference: log-ratio 0 at step 1, and the model is not refused."""
    fields = FIELDS | {"bf16": True, "max_steps": 1}
    if not live:
        fields["precompute_ref_log_probs"] = False
    config = TrainSection(model=str(tiny_policy), methods={"m": LossSection(loss="dpo", **live)}, trainer=fields)
    train_policy(Dataset.from_list(rows(8)), config, "m", tmp_path, seed=3)
    first = read_json(tmp_path / "history.json")["history"][0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0


def test_extreme_weights_are_written_to_the_history(tiny_policy: Path, tmp_path: Path) -> None:
    config = TrainSection(
        model=str(tiny_policy), methods={"m": LossSection(loss="dpo", token_mask=TokenMaskSection())}, trainer=FIELDS
    )
    train_policy(Dataset.from_list(rows(16)), config, "m", tmp_path, seed=0)
    found = read_json(tmp_path / "history.json")
    shown = {token for token, _ in found["token_mask"]["closed"]}
    assert shown and shown <= {*WORDS, "<eos>"}
    assert all(0 < entry["token_mask/left"] < 1 for entry in found["history"])
