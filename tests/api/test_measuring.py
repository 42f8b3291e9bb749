"""``measure_entanglement``, ``measure_trust`` and ``advise``: the numbers of the verbs, on tables in memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.api import advice, advise, compare_losses, measure_entanglement, measure_trust
from align.commands.trust import trust
from align.config import PairsSection
from align.entanglement.measure import MeasureJob
from align.errors import AlignError, ConfigError
from align.io.files import read_json
from align.losses.registry import resolve
from align.models.tokenization import tokenize_pairs
from tests.api.test_pair_tables import in_python
from tests.helpers.builders import rows


def test_entanglement_is_that_of_the_job(tiny_policy: Path) -> None:
    """A loaded model, its folder and the job of the verb give the same rows; the changes are those of the products."""
    pairs = Dataset.from_list(rows(5))
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    model.train()
    found = measure_entanglement(model, tokenizer, rows(5), loss="madpo")
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    work = MeasureJob(str(tiny_policy), None, resolve("madpo", {}), None, 2048, 1024).start()
    expected = work(tokenize_pairs(pairs, tokenizer, max_length=1024))
    names = {"chosen_change": "step_chosen", "rejected_change": "step_rejected"}
    assert found["id"] == [f"p{k}" for k in range(5)]
    for name in found.column_names:
        ours, theirs = found[name], expected[names.get(name, name)]
        assert list(ours) == (theirs if isinstance(ours[0], str) else pytest.approx(theirs, rel=1e-6, nan_ok=True)), (
            name
        )
    by_folder = measure_entanglement(str(tiny_policy), None, pairs, loss="madpo")
    assert by_folder["cosine"] == pytest.approx(found["cosine"], rel=1e-6)
    for row in found:
        assert row["chosen_change"] == pytest.approx(
            row["d_w"] * row["chosen_sq"] - row["d_l"] * row["inner"], rel=1e-6
        )
        assert row["verdict"] == "undecided" or row["entangled"] == (row["verdict"] not in ("separated", "no signal"))


def test_a_model_in_16_bits_is_measured_in_float32(tiny_policy: Path) -> None:
    """As `from_pretrained` loads most models of the hub; its own products would be wrong in the third digit."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    found = measure_entanglement(model, tokenizer, rows(4))
    assert model.dtype == torch.bfloat16
    assert found.to_list() == measure_entanglement(model.float(), tokenizer, rows(4)).to_list()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ({"loss": "dpoo"}, "loss-name", "'dpoo' is not known"),
        ({"loss": "beta_dpo"}, "entanglement-loss", 'measure with loss="dpo"'),
        ({"loss": "madpo", "pairs": [{"prompt": "the film is", "chosen": "good", "rejected": "bad"}]},
         "loss-needs-margin", "RewardModel"),
        ({"max_length": 1}, "config-option", "max_length: found 1"),
        ({"max_length": 3}, "empty-completion", "raise max_length"),
        ({"model": 3}, "config-option", "model: found 3"),
        ({"model": "no/where/at/all"}, "model-load", "no/where/at/all"),
        ({"pairs": []}, "data-empty", "holds no rows"),
        ({"pairs": [{"prompt": "x", "chosen": "y"}]}, "data-column", "no column 'rejected'"),
        ({"pairs": rows(1) + rows(1)}, "pair-duplicate-id", "row 1, id: found 'p0'"),
    ],
)  # fmt: skip
def test_entanglement_refuses(arguments: dict[str, Any], code: str, words: str, tiny_policy: Path) -> None:
    given = {"model": str(tiny_policy), "tokenizer": None, "pairs": rows(3)} | arguments
    with pytest.raises(AlignError) as caught:
        measure_entanglement(**given)
    assert caught.value.code == code and words in str(caught.value)
    in_python(caught.value)


def test_a_loaded_model_needs_its_tokenizer(tiny_policy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="float32")
    with pytest.raises(AlignError, match="tokenizer: found None, expected that of the loaded model"):
        measure_entanglement(model, None, rows(2))


def test_trust_and_advice_are_those_of_the_verbs(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Dataset.from_list(rows(60)).to_json(str(tmp_path / "pairs.jsonl"))
    trust(
        PairsSection(path=str(tmp_path / "pairs.jsonl")), str(tiny_policy), tmp_path / "out", margins="outside",
        allow_in_sample=False, max_length=64, seed=1,
    )  # fmt: skip
    expected = read_json(tmp_path / "out" / "trust.json")
    settings: dict[str, Any] = {
        "margins": "outside",
        "max_length": 64,
        "seed": 1,
        "cache": tmp_path / "out" / "features",
    }
    found = measure_trust(rows(60), tiny_policy, **settings)
    differing = ("source", "seconds")
    assert {key: value for key, value in json.loads(json.dumps(found.numbers)).items() if key not in differing} == {
        key: value for key, value in expected.items() if key not in differing
    }
    assert found.loss_kwargs == {
        "slope": expected["slope"],
        **{k: expected["chosen"][k] for k in ("trust", "strength")},
    }
    assert found.summary.splitlines()[0] == expected["sentences"]["verdict"] and found.decided is expected["decided"]
    origins: list[str] = []

    def known(*arguments: Any, origin: str, **others: Any) -> dict[str, Any]:
        origins.append(origin)
        return found.numbers

    monkeypatch.setattr(advice, "assess_trust", known)
    marked = Dataset.from_list(rows(60)).add_column("margin_source", ["outside"] * 60)
    other = advise(marked, tiny_policy)
    assert other.summary.splitlines()[-1] == expected["sentences"]["shared"] and origins == ["outside"]
    other.write_page(tmp_path / "pages" / "trust.html")
    assert expected["sentences"]["verdict"][:40] in (tmp_path / "pages" / "trust.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ({"margins": "inside"}, "config-option", "margins: found 'inside', expected one of outside, cross-fitted"),
        ({"margins": None}, "trust-origin", 'give margins="outside"'),
        ({"margins": "in-sample"}, "trust-in-sample", "allow_in_sample=True"),
        ({"pairs": rows(20)}, "trust-too-few", "pairs: found 20 pairs"),
        ({"pairs": [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows(60)]}, "trust-margins",
         "RewardModel.from_pretrained"),
        ({"model": object()}, "config-option", "model: found a object, expected a folder or hub id"),
        ({"pairs": []}, "data-empty", "holds no rows"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("call", [measure_trust, advise])
def test_trust_refuses(call: Any, arguments: dict[str, Any], code: str, words: str, tiny_policy: Path) -> None:
    with pytest.raises(AlignError) as caught:
        call(**({"pairs": rows(60), "model": tiny_policy, "margins": "outside"} | arguments))
    assert caught.value.code == code and words in str(caught.value)
    in_python(caught.value)


def test_losses_are_compared_on_one_measurement(tiny_policy: Path) -> None:
    table = compare_losses(str(tiny_policy), None, rows(8), losses=["dpo", {"dpo": 1.0, "nll": 2.0}, "madpo", "ld_dpo"])
    by_name = {row["loss"]: row for row in table}
    assert set(by_name) == {"dpo", "dpo + 2 nll", "madpo"}
    measured = measure_entanglement(str(tiny_policy), None, rows(8))
    falls = np.mean([verdict in ("both fall", "reversed") for verdict in measured["verdict"]])
    assert by_name["dpo"]["falls"] == pytest.approx(falls)
    assert by_name["dpo + 2 nll"]["falls"] <= by_name["dpo"]["falls"]
    without = [{key: value for key, value in row.items() if key != "margin"} for row in rows(8)]
    assert "madpo" not in compare_losses(str(tiny_policy), None, without)["loss"]
    for wrong in ([], "dpo", ["dpoo"], [{"dpo": -1.0}]):
        with pytest.raises(ConfigError):
            compare_losses(str(tiny_policy), None, rows(8), losses=wrong)
