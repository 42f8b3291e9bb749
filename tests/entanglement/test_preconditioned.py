"""Products under AdamW's preconditioner: against torch's own AdamW, and its state in a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from align.commands.entangle_losses import LossesSettings, compare
from align.config import PairsSection
from align.entanglement.compare_losses import loss_weights_of
from align.entanglement.measure import load_measured
from align.entanglement.measure_pairs import PairMeasurement
from align.entanglement.preconditioned import (
    FIRST_STEP,
    PairBatches,
    measured_by,
    of_checkpoint,
    of_first_step,
    preconditioned,
)
from align.errors import DataError
from align.losses.registry import resolve
from align.models.loading import load_tokenizer
from align.models.logps import pair_logps
from align.models.tokenization import tokenize_pairs
from tests.helpers.builders import rows, trained_adapter
from tests.training.test_trainer import ours


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_first_step_of_adamw_moves_a_pair_as_predicted(side: str, tiny_policy: Path) -> None:
    """lr (d_w <g, P gw> - d_l <g, P gl>), within the second order of a small step."""
    tokens = tokenize_pairs(Dataset.from_list(rows(1)), load_tokenizer(str(tiny_policy)), max_length=64)
    model, dpo, rate = load_measured(str(tiny_policy)), resolve("dpo", {}), 1e-6
    products = measured_by(model, None)
    table = PairMeasurement(products, dpo, 0)(tokens)
    batches = PairBatches(tokens, 0, 64, "cpu")
    d_w, d_l = loss_weights_of(dpo, table)
    scale = of_first_step(products, batches, d_w, d_l)
    (row,) = list(preconditioned(table, products, batches, scale))
    first, second = ("chosen_sq", "inner") if side == "chosen" else ("inner", "rejected_sq")
    plain = float(d_w) * row[first] - float(d_l) * row[second]

    (batch,) = batches
    logps = pair_logps(model, batch, "concatenated")
    before = {name: getattr(logps, name).item() for name in ("chosen", "rejected")}
    loss = (float(d_l) * logps.rejected - float(d_w) * logps.chosen).sum()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    after = getattr(pair_logps(model, batch, "concatenated"), side).item()
    assert (after - before[side]) / rate == pytest.approx(plain * min(1.0, 1 / norm), rel=0.03)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_state_of_a_checkpoint_belongs_to_its_parameters(adapter: bool, tiny_policy: Path, tmp_path: Path) -> None:
    policy = trained_adapter(tiny_policy, tmp_path / "start", seed=1) if adapter else tiny_policy
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "save_total_limit": None}
    trainer = ours(policy, tmp_path / "out", **fields)
    trainer.train()
    (checkpoint,) = (tmp_path / "out" / "checkpoints").glob("checkpoint-*")
    scale = of_checkpoint(load_measured(str(checkpoint)), checkpoint)
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert set(scale) == set(trained)
    states = trainer.optimizer.optimizer.state
    for name, weight in trained.items():
        v = states[weight]["exp_avg_sq"] / (1 - trainer.args.adam_beta2**2)
        assert torch.allclose(scale[name], 1 / (v.sqrt() + 1e-8), rtol=1e-4), name

    with pytest.raises(DataError, match="parameters") as other:
        of_checkpoint(torch.nn.Linear(2, 2), checkpoint)
    assert other.value.code == "optimizer-state"
    (checkpoint / "optimizer.pt").write_bytes(b"no pickle")
    with pytest.raises(DataError, match="cannot be read"):
        of_checkpoint(load_measured(str(checkpoint)), checkpoint)
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(DataError, match=r"optimizer\.pt: not found"):
        of_checkpoint(load_measured(str(checkpoint)), checkpoint)


def test_the_command_shows_both(tiny_policy: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    settings = LossesSettings(str(tiny_policy), optimizer=FIRST_STEP)
    compare(PairsSection(path=str(file)), settings, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "losses.json").read_text())
    found = {row["loss"]: row for row in report["losses"]}
    assert found["nll"]["optimizer"]["falls"]["value"] == 0
    assert all(row["optimizer"]["d_w"] == row["d_w"] for row in found.values())
    assert any(row["optimizer"]["nll_for_all"] != row["nll_for_all"] for row in found.values())
    assert "under AdamW" in (tmp_path / "out" / "report.html").read_text()
