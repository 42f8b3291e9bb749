"""`align entangle report`: which pairs it takes from a table, and which it leaves out."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from align.commands.entangle import ReportSettings, report
from align.config import PairsSection
from align.errors import DataError, ModelError
from align.io.files import read_json
from align.viewer.measured import folder_measured
from align.viewer.tokens import measured_tokens
from tests.helpers.builders import rows, tokenizer


def measured(
    table: list[dict[str, Any]], policy: Path, folder: Path, **fields: Any
) -> tuple[list[str], dict[str, Any]]:
    """Ids that were measured, and the summary's part about the run."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    settings = ReportSettings(str(policy), **({"loss": "dpo", "parameters": {}, "shown": 1, "matrices": 0} | fields))
    report(PairsSection(path=str(folder / "pairs.jsonl")), settings, folder / "out")
    found = Dataset.from_parquet(str(next((folder / "out").rglob("entanglement.parquet"))))
    return list(found["id"]), read_json(folder / "out" / "summary.json")["run"]


def test_a_part_of_the_pairs_is_a_fair_sample(tiny_policy: Path, tmp_path: Path) -> None:
    """Ids that begin with a source do not decide which source is measured, nor does the order of the file."""
    table = [row | {"id": f"{'easy' if k < 40 else 'hard'}-{k:03d}"} for k, row in enumerate(rows(80))]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    some, run = measured(table, tiny_policy, tmp_path / "a", limit=24)
    hard = sum(name.startswith("hard") for name in some)
    assert len(some) == 24 and 5 <= hard <= 19 and run["of"] == 80
    assert set(some) == set(measured(table[::-1], tiny_policy, tmp_path / "b", limit=24)[0])
    assert "24 of 80 pairs" in (tmp_path / "a" / "out" / "report.html").read_text()
    (shown,) = read_json(tmp_path / "a" / "out" / "tokens.json")
    (again,) = measured_tokens(folder_measured(tmp_path / "a" / "out"), shown["id"])
    row = next(row for row in table if row["id"] == shown["id"])
    assert "".join(token["text"] for token in again["chosen"]).startswith(row["chosen"].replace(" ", ""))
    assert max(abs(token["shade"]) for token in again["chosen"]) == 1.0


def test_a_pair_whose_prompt_fills_the_limit_is_left_out_by_name(tiny_policy: Path, tmp_path: Path) -> None:
    table = rows(8)
    table[3]["prompt"] = "the film is " * 20
    some, run = measured(table, tiny_policy, tmp_path, max_length=32)
    assert len(some) == 7 and run["left_out"] == ["p3"]
    assert "1 left out" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(DataError, match="none of 8 pairs has a token of a response within 2 tokens"):
        measured(table, tiny_policy, tmp_path, max_length=2)


def test_the_page_of_a_loha_adapter_has_its_colors_and_names_its_kind(tiny_policy: Path, tmp_path: Path) -> None:
    """Its layers have no forward-mode derivative, so the tokens of its pairs are measured by backward passes."""
    config = peft.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="float32"), config)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    _, run = measured(rows(2), tmp_path / "adapter", tmp_path, matrices=1)
    assert run["adapter"] == "LOHA" and run["by_rule"] == 0 and len(run["without_rule"]) == 8
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Adapter of the kind LOHA." in page and run["without_rule"][0] in page
    assert page.count('class="matrix"') == 1 and 'class="up' in page
    assert "would lower its chosen response or raise its rejected response" in page


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"])
def test_an_adapter_of_virtual_tokens_is_named(kind: str, tiny_policy: Path, tmp_path: Path) -> None:
    fields = {"encoder_hidden_size": 8} if kind == "P_TUNING" else {}
    config = peft.get_peft_config({"peft_type": kind, "task_type": "CAUSAL_LM", "num_virtual_tokens": 2} | fields)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="float32"), config)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=rf"adapter of the kind {kind}, which puts tokens of its own"):
        measured(rows(2), tmp_path / "adapter", tmp_path)
