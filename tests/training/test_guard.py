"""A number that is not finite stops the training in that step, before the weights change; the pair is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from align.config import LossSection, RewardSection, TrainSection
from align.errors import NumericsError
from align.losses.pairwise import PairLogps, gradient_weights
from align.losses.registry import LOSSES, resolve
from align.models import logps
from align.models.lm_head import LogitForm, score_tokens
from align.training.base.finite_guard import all_finite
from align.training.train import make_trainer
from reward_models.train import train_reward_model
from tests.helpers.builders import bert_reward, rows
from tests.models.test_logps import make_batch, tiny

SMALL = {"max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False}


def trainer(model: Path, table: list[dict[str, Any]], output: Path, **fields: Any) -> Any:
    """A trainer of plain DPO on the pairs of ``table``."""
    config = TrainSection(model=str(model), methods={"dpo": LossSection(loss="dpo")}, trainer=SMALL | fields)
    return make_trainer(Dataset.from_list(table), config, "dpo", output, seed=0)


@pytest.fixture
def table() -> list[dict[str, Any]]:
    """Twelve pairs; p5 alone has the word `dull`."""
    pairs = rows(12)
    pairs[5]["rejected"] = " dull plot"
    return pairs


def stopped(subject: Any) -> tuple[str, dict[str, Any]]:
    """Message of the training's error, and the file that it writes; weights that were finite still are."""
    before = {name: bool(torch.isfinite(p).all()) for name, p in subject.model.named_parameters()}
    with pytest.raises(NumericsError) as caught:
        subject.train()
    written = json.loads((Path(subject.args.output_dir) / "non_finite.json").read_text())
    if written["what"] != "weight":
        assert all(torch.isfinite(p).all() or not before[name] for name, p in subject.model.named_parameters())
    return caught.value.message, written


def test_a_loss_that_is_not_a_number_names_its_pair(
    tiny_policy: Path, table: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    with torch.no_grad():
        model.get_input_embeddings().weight[16] = float("nan")
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((tiny_policy / name).read_bytes())
    message, written = stopped(trainer(broken, table, tmp_path))
    assert "the loss of pair p5 is nan" in message and "rejected nan" in message and "chosen -" in message
    assert written["at_fault"] == ["p5"] and len(written["pairs"]) == 4 and "p5" in written["pairs"]
    assert written["what"] == "loss" and f"step {written['step']}:" in message


def test_a_gradient_that_overflows_names_its_pair(
    tiny_policy: Path, table: list[dict[str, Any]], tmp_path: Path
) -> None:
    weighted = [{**row, "weight": 3e38 if row["id"] == "p7" else 1.0} for row in table]
    message, written = stopped(trainer(tiny_policy, weighted, tmp_path))
    assert "the gradient of pair p7 has the norm inf" in message
    assert written["what"] == "gradient" and written["at_fault"] == ["p7"]


def test_weights_that_overflow_stop_the_run(tiny_policy: Path, table: list[dict[str, Any]], tmp_path: Path) -> None:
    table = [{**row, "weight": 1000.0} for row in table]
    rate = {"learning_rate": 3e38, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0}
    message, written = stopped(trainer(tiny_policy, table, tmp_path, **rate))
    assert (
        "the weight " in message and "is not finite" in message and written["step"] == 1 and len(written["pairs"]) == 4
    )


def test_a_finite_training_writes_no_report(tiny_policy: Path, table: list[dict[str, Any]], tmp_path: Path) -> None:
    extreme = [{**row, "margin": margin} for row, margin in zip(table, [-1e6, 1e6, 0.0] * 4, strict=True)]
    subject = trainer(tiny_policy, extreme, tmp_path)
    subject.train()
    assert subject.state.global_step == 4 and not list(tmp_path.rglob("non_finite.json"))
    assert all(torch.isfinite(p).all() for p in subject.model.parameters())


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PURE = [name for name, spec in LOSSES.items() if spec.from_logps]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PURE)
def test_losses_and_their_gradients_stay_finite(name: str, dtype: torch.dtype) -> None:
    """Log-ratios and margins at the limits of each dtype (1e6 at most), lengths of 1 and of 100,000 tokens."""
    top = min(1e6, float(torch.finfo(dtype).max) / 4)
    ends = torch.tensor([-top, -30.0, -1e-3, 0.0, 1e-3, 30.0, top])
    chosen, rejected, margin = (grid.flatten() for grid in torch.meshgrid(ends, ends, ends, indexing="ij"))
    zero, lengths = torch.zeros_like(chosen), torch.tensor([1.0, 1e5]).repeat(len(chosen))[: len(chosen)]
    pair = PairLogps(chosen.to(dtype).requires_grad_(), rejected.to(dtype).requires_grad_(), zero.to(dtype),
                     zero.to(dtype), lengths, lengths.flip(0))  # fmt: skip
    found = resolve(name, {})(pair, margin.to(dtype))
    assert found.dtype == torch.float32 and torch.isfinite(found).all()
    scale = 1.0 if dtype != torch.float16 else 1 / max(1.0, float(found.detach().abs().max()))
    d_w, d_l = gradient_weights(found * scale, pair)
    assert torch.isfinite(d_w).all() and torch.isfinite(d_l).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_of_long_and_short_responses_are_finite(dtype: torch.dtype) -> None:
    model = tiny("Llama", max_position_embeddings=2048).to(dtype)
    logps.add_completion_head(model)
    batch = make_batch([(3, 1, 1200), (1, 900, 1), (1000, 2, 2)])
    found = logps.pair_logps(model, batch, "concatenated")
    assert torch.isfinite(found.chosen).all() and torch.isfinite(found.rejected).all()
    assert (found.chosen_length.tolist(), found.rejected_length.tolist()) == ([1, 900, 2], [1200, 1, 2])
    (found.chosen.sum() - found.rejected.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_head_is_finite_for_logits_far_apart(dtype: torch.dtype) -> None:
    head = torch.nn.Linear(2, 3, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.0, 100.0]]))
    hidden = torch.tensor([[300.0, 0.0], [-300.0, 1.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    scores = score_tokens(hidden, head, torch.tensor([1, 0, 2]), LogitForm())
    assert all(torch.isfinite(value).all() for value in scores) and (scores.logps <= 0).all()
    scores.logps.sum().backward()
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_a_reward_that_is_not_a_number_names_its_pair(table: list[dict[str, Any]], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    backbone = bert_reward(tmp_path / "backbone")
    model = AutoModelForSequenceClassification.from_pretrained(backbone)
    with torch.no_grad():
        model.get_input_embeddings().weight[16] = float("inf")
    model.save_pretrained(backbone)
    order = {"train_sampling_strategy": "random"}  # the pair at fault is in the first step
    config = RewardSection(model=str(backbone), max_length=64, trainer=SMALL | order)
    with pytest.raises(
        NumericsError, match=r"the loss of pair p5 is not finite \(reward of chosen .*, of rejected nan"
    ):
        train_reward_model(Dataset.from_list(table), config, tmp_path / "out", seed=0)
    written = json.loads((tmp_path / "out-checkpoints" / "non_finite.json").read_text())
    assert written["at_fault"] == ["p5"] and len(written["pairs"]) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float) -> None:
    tensors = [torch.ones(3, 5, dtype=dtype), torch.zeros(7, dtype=dtype)]
    assert all_finite(tensors) and all_finite([])
    tensors[1][4] = value
    assert not all_finite(tensors) and not all_finite([torch.tensor([float("inf"), float("-inf")], dtype=dtype)])


def test_a_sum_that_overflows_is_no_fault() -> None:
    assert all_finite([torch.full((4,), 3e38), torch.full((9,), 6e4, dtype=torch.float16)])
    assert not all_finite([torch.tensor([3e38, 3e38, float("nan")])])
