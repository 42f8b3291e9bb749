"""Every loss on the same measured pairs: against a measurement with that loss, and the NLL weight that keeps up."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from align.commands.entangle_losses import LossesSettings, compare, read_sum
from align.config import PairsSection
from align.data.pairs import load_pairs
from align.entanglement.compare_losses import compare_losses, nll_weight
from align.entanglement.conditions import changes
from align.entanglement.measure_pairs import PairMeasurement
from align.entanglement.products import GradientProducts
from align.errors import ConfigError
from align.losses.registry import LOSSES, resolve
from align.losses.sums import resolve_sum
from align.models.loading import load_policy, load_tokenizer
from align.models.tokenization import tokenize_pairs
from tests.helpers.builders import causal, rows

PAIRS = 10


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The folder of a report on a policy that differs from its reference."""
    folder = tmp_path_factory.mktemp("losses")
    reference, policy = causal(folder / "reference"), causal(folder / "policy")
    model = load_policy(str(policy))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    model.save_pretrained(policy)
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(PAIRS)))
    settings = LossesSettings(str(policy), str(reference), sums=("dpo=1,nll=0.5",))
    compare(PairsSection(path=str(file)), settings, folder / "out")
    table = Dataset.from_parquet(str(folder / "out" / "measurements" / "entanglement.parquet"))
    return {"folder": folder, "file": file, "policy": policy, "reference": reference, "table": table}


def test_it_agrees_with_a_measurement_under_each_loss(measured: dict[str, Any]) -> None:
    """The share of falling chosen responses and the medians, for losses of h, of margins and of the policy alone."""
    tokenizer = load_tokenizer(str(measured["policy"]))
    tokens = tokenize_pairs(load_pairs(PairsSection(path=str(measured["file"]))), tokenizer, max_length=1024)
    models = [load_policy(str(measured[name])) for name in ("policy", "reference")]
    names = ["ipo", "mmpo", "orpo", "apo_down"]
    found, _ = compare_losses(measured["table"], [resolve(name, {}) for name in names])
    by_name = {item.loss: item for item in found}
    for name in names:
        measurement = PairMeasurement(GradientProducts(models[0]), resolve(name, {}), tokenizer.pad_token_id, models[1])
        table = measurement(tokens)
        falls = [verdict in ("both fall", "reversed") for verdict in table["verdict"]]
        assert by_name[name].falls["value"] == pytest.approx(np.mean(falls))
        assert by_name[name].d_w == pytest.approx(float(torch.tensor(table["d_w"]).median()), rel=1e-4)
        assert by_name[name].d_l == pytest.approx(float(torch.tensor(table["d_l"]).median()), rel=1e-4)


def test_the_nll_weight_just_keeps_every_chosen_response_up(measured: dict[str, Any]) -> None:
    """With a hundredth more no chosen response falls, with a hundredth less the last one does."""
    table = measured["table"]
    (alone,), _ = compare_losses(table, [resolve("apo_down", {})])
    assert alone.falls["value"] > 0 and alone.nll_for_all >= alone.nll_for_most > 0
    shares = []
    for factor in (0.99, 1.01):
        sum_ = resolve_sum({"apo_down": 1.0, "nll": factor * alone.nll_for_all}, {})
        (item,), _ = compare_losses(table, [sum_])
        shares.append(item.falls["value"])
    assert shares == [pytest.approx(1 / PAIRS), 0.0]


def test_nll_weight_by_hand() -> None:
    """d_w 1, d_l 2, |gw|^2 4, <gw, gl> 3, length 10: 10 (2 * 3 / 4 - 1) = 5; a pair that rises needs none."""
    one = torch.tensor([1.0, 1.0], dtype=torch.float64)
    inner = torch.tensor([3.0, -3.0], dtype=torch.float64)
    found = nll_weight(one, 2 * one, 4 * one, inner, 10 * one)
    assert found.tolist() == [5.0, 0.0]
    step = changes(4 * one, one, inner, d_w=one + found / 10, d_l=2 * one, noise=1e-5)
    assert step.chosen.tolist() == [0.0, 10.0]


def test_the_report_has_every_loss_and_says_which_it_leaves_out(measured: dict[str, Any]) -> None:
    report = json.loads((measured["folder"] / "out" / "losses.json").read_text())
    shown = [row["loss"] for row in report["losses"]]
    reading = {name for name, spec in LOSSES.items() if spec.tokens != "none" or spec.unpaired}
    assert set(shown) | set(report["left_out"]) == {*LOSSES, "dpo + 0.5 nll"} and set(report["left_out"]) == reading
    values = [row["falls"]["value"] for row in report["losses"]]
    assert values == sorted(values) and not report["run"]["at_start"]
    page = (measured["folder"] / "out" / "report.html").read_text()
    assert "dpo + 0.5 nll" in page and "<script" not in page and "Not compared" in page


def test_losses_that_need_margins_are_left_out_without_them(measured: dict[str, Any]) -> None:
    table = measured["table"].remove_columns("margin")
    found, left_out = compare_losses(table, [resolve(name, {}) for name in ("dpo", "madpo")])
    assert [item.loss for item in found] == ["dpo"] and left_out == {"madpo": "needs a margin of every pair"}


def test_sums_on_the_command_line() -> None:
    assert read_sum("madpo=1,nll=0.1").spec.name == "madpo + 0.1 nll" and read_sum("dpo").spec.name == "dpo"
    with pytest.raises(ConfigError, match=r"--sum dpo=x: found the weight 'x', expected a number"):
        read_sum("dpo=x")
    with pytest.raises(ConfigError, match=r"nll: found the weight -1.0"):
        read_sum("dpo=1,nll=-1")
