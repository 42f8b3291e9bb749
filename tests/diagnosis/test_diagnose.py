"""What pairs can teach: planted shortcuts and noise are found, clean tables raise no alarm, numbers are the model's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import align
from align.cli.main import app
from align.diagnosis import cost, under_model
from align.diagnosis.diagnose import diagnose
from align.diagnosis.noise import find_noise, flip_rate
from align.diagnosis.shortcuts import find_shortcuts
from align.diagnosis.surface import refusal, text_format
from align.diagnosis.texts import describe_texts, similarity
from align.errors import AlignError, ConfigError
from align.losses.registry import resolve
from align.reports.diagnosis_page import write_diagnosis_page
from tests.helpers.builders import WORDS, rows

LENGTHS = (3, 20)


def world(seed: int, count: int, *, longer: float = 0.5, flip: float = 0.0, repeats: int = 1) -> Dataset:
    """Random texts; the longer one is chosen with probability ``longer``; each judgment is wrong with ``flip``."""
    draw = np.random.default_rng(seed)
    found = []
    for k in range(count):
        one, other = (" ".join(draw.choice(WORDS[:14], draw.integers(*LENGTHS))) for _ in range(2))
        better, worse = (one, other) if (len(one) > len(other)) == (draw.random() < longer) else (other, one)
        for _ in range(repeats):
            chosen, rejected = (worse, better) if draw.random() < flip else (better, worse)
            found.append({"prompt": f"the film {k} was", "chosen": chosen, "rejected": rejected})
    return Dataset.from_list([{"id": str(k), **row} for k, row in enumerate(found)])


def accuracies(pairs: Dataset) -> dict[str, Any]:
    return {one.name: one for one in find_shortcuts(pairs)}


def test_a_planted_length_shortcut_is_recovered_within_its_interval() -> None:
    inside = 0
    for seed in range(10):
        found = accuracies(world(seed, 400, longer=0.75))
        assert found["length"].alarm and found["all together"].alarm
        inside += found["length"].accuracy["low"] <= 0.75 <= found["length"].accuracy["high"]
        assert not found["refusals"].alarm and found["refusals"].accuracy["value"] == 0.5
    assert inside >= 8  # 95% intervals: fewer than 8 of 10 has probability 1.2%


def test_no_alarm_on_coin_flips() -> None:
    alarms = sum(any(one.alarm for one in find_shortcuts(world(seed, 120))) for seed in range(100, 120))
    assert alarms <= 3  # at 5% more than 3 of 20 has probability 1.6%


def test_copies_and_shared_prompts_are_no_evidence() -> None:
    """Twenty pairs, each ten times: a fit that saw a pair's copies would be right about it."""
    alarms = 0
    for seed in range(8):
        pairs = world(seed, 20)
        table = Dataset.from_list([{**pairs[k], "id": f"{k}-{n}"} for k in range(20) for n in range(10)])
        alarms += any(one.alarm for one in find_shortcuts(table))
    assert alarms <= 2  # at 5% more than 2 of 8 has probability 0.6%


def test_who_wrote_it_is_a_shortcut() -> None:
    draw = np.random.default_rng(0)
    pairs = world(3, 200)
    strong = draw.random(200) < 0.9
    names = {side: ["big" if s == (side == "chosen") else "small" for s in strong] for side in ("chosen", "rejected")}
    for side, values in names.items():
        pairs = pairs.add_column(f"{side}_model", values)
    found = {one.name: one for one in find_shortcuts(pairs, own=["chosen_model", "rejected_model"])}
    assert found["who wrote it (model)"].accuracy["value"] == pytest.approx(strong.mean())
    assert "who wrote it (model)" not in accuracies(pairs)


def test_too_few_pairs_are_not_fitted() -> None:
    assert find_shortcuts(world(0, 39)) == []
    assert find_shortcuts(Dataset.from_list([{**world(0, 1)[0], "id": str(k)} for k in range(60)])) == []


def test_surface() -> None:
    assert refusal("I\u2019m sorry, but no.") == [1.0] and refusal("Sorry state of affairs") == [0.0]
    found = dict(
        zip(("bullets", "numbers", "headings", "code"), text_format("# A\n- x\n1. y\n```c\n```"), strict=False)
    )
    assert found == {"bullets": 1.0, "numbers": 1.0, "headings": 1.0, "code": 1.0}


@pytest.mark.parametrize("flip", [0.1, 0.3])
def test_a_planted_flip_rate_is_recovered_from_repeated_judgments(flip: float) -> None:
    inside = 0
    for seed in range(20):
        found = find_noise(world(seed, 300, flip=flip, repeats=2))
        assert found["repeated"] == 300
        inside += found["flip_rate"]["low"] <= flip <= found["flip_rate"]["high"]
    assert inside >= 16


def test_flip_rate_is_the_smaller_root() -> None:
    for rate in (0.0, 0.1, 0.37, 0.5):
        assert flip_rate(2 * rate * (1 - rate)) == pytest.approx(rate)
    assert flip_rate(0.9) == 0.5


def test_circles_copies_and_contradictions_are_counted() -> None:
    def pair(k: int, better: str, worse: str) -> dict[str, Any]:
        return {"id": str(k), "prompt": "p", "chosen": better, "rejected": worse}

    table = Dataset.from_list(
        [pair(0, "a", "b"), pair(1, "b", "c"), pair(2, "c", "a"), pair(3, "a", "b"), pair(4, "b", "a")]
    )
    found = find_noise(table)
    assert (found["circles"], found["copies"], found["repeated"], found["contradicted"]) == (1, 1, 1, 1)
    assert found["examples"] == [["0", "3", "4"]]
    assert find_noise(table.select([0, 1]))["flip_rate"] is None


def test_votes_against_the_label() -> None:
    pairs = world(0, 4).add_column("vote_share", [1.0, 0.8, 0.6, 0.6])
    assert find_noise(pairs)["minority_votes"]["value"] == pytest.approx(0.25)


def test_texts() -> None:
    table = Dataset.from_list(
        [
            {"id": "0", "prompt": "a b", "chosen": "one two three four", "rejected": "one two three five"},
            {"id": "1", "prompt": "a b", "chosen": "mail me: someone@example.org", "rejected": "no"},
        ]
    ).add_column("chosen_finish_reason", ["length", "stop"])
    found = describe_texts(table)
    assert found["prompts"] == 1 and found["most_common_prompt"] == 2
    assert found["chosen_longer"]["value"] == 0.75 and found["cut_off"] == {"chosen": 0.5, "rejected": 0.0}
    assert found["personal_data"]["value"] == 0.5 and found["near_identical"]["value"] == 0.0
    assert similarity("a b c d e f g h i j", "a b c d e f g h i k") == 0.9


def test_log_probs_are_those_of_the_model(tiny_policy: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_policy), AutoTokenizer.from_pretrained(tiny_policy)
    pairs = Dataset.from_list([{"id": "0", "prompt": "the film was", "chosen": " very good", "rejected": " bad"}])
    found = under_model.off_policy(pairs, model.eval(), tokenizer, 64)
    prompt, answer = (tokenizer(text)["input_ids"] for text in ("the film was", " very good"))
    ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
    assert found["chosen"]["logp_per_token"]["value"] == pytest.approx(float(logps.mean()), abs=1e-5)
    assert found["chosen"]["never"]["value"] == pytest.approx(float((logps < np.log(1e-4)).float().mean()))
    assert under_model.off_policy(pairs, model, tokenizer, 2) == {"pairs": 0}


def test_a_whole_diagnosis_and_its_page(tiny_policy: Path, tmp_path: Path) -> None:
    pairs = Dataset.from_list([*world(0, 60, longer=0.9), {**world(0, 1)[0], "id": "<script>alert(1)</script>"}])
    found = diagnose(pairs, model=str(tiny_policy), held_out=[pairs[0]], max_length=20, probe=False)
    levels = [one["level"] for one in found["findings"]]
    assert levels == sorted(levels, reverse=True) and found["overlap"]["pairs"] == 2
    assert any("length" in one["says"] for one in found["findings"]) and 1 <= len(found["first"]) <= 3
    risk = under_model.entanglement_risk(
        pairs, AutoModelForCausalLM.from_pretrained(tiny_policy), AutoTokenizer.from_pretrained(tiny_policy),
        resolve("dpo", {}), 20,
    )  # fmt: skip
    assert found["entanglement"] == risk
    write_diagnosis_page(tmp_path / "page.html", {"source": "<b>x</b>", "model": None, **found})
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page and "<b>x</b>" not in page and "What to do first" in page


def test_the_command_and_python_find_the_same(tmp_path: Path) -> None:
    pairs = world(5, 60, longer=0.9)
    file = tmp_path / "pairs.jsonl"
    pairs.to_json(str(file))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": pairs[0]["prompt"]}) + "\n")
    command = ["data", "check", str(file), "--deep", "--output", str(tmp_path / "out"), "--held-out", str(held_out)]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and "[act] 1 of 60 pairs share texts" in shown.stdout
    found = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    python = align.diagnose_pairs(list(pairs))
    assert found["shortcuts"] == python["shortcuts"] and found["noise"] == python["noise"]
    assert (tmp_path / "out" / "diagnosis.html").exists()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and json.loads((tmp_path / "out" / "diagnosis.json").read_text()) == found


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model: found int"):
        align.diagnose_pairs(rows(4), 3)  # type: ignore[arg-type]
    with pytest.raises(AlignError, match="did you mean"):
        align.diagnose_pairs(rows(4), "x", loss="ddpo")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    shown = CliRunner().invoke(app, ["data", "check", str(tmp_path / "bad.jsonl"), "--deep", "--output", str(tmp_path)])
    assert isinstance(shown.exception, AlignError) and "no valid pair" in str(shown.exception)


@pytest.mark.slow
def test_a_probe_that_fails_says_why(tmp_path: Path) -> None:
    setting = [cost.Setting("x", str(tmp_path / "no-model"), False, batch, 32, False) for batch in (1, 2)]
    (found,) = cost.probe(world(0, 2), setting)
    assert set(found) == {"name", "problem"} and "no-model" in found["problem"]


@pytest.mark.slow
def test_memory_and_seconds_are_measured(tiny_policy: Path) -> None:
    found = cost.probe(world(0, 2), cost.probe_settings(str(tiny_policy), 64, bf16=False)[:2])
    assert found[0]["seconds_per_pair"] > 0 and found[0]["largest_batch"] >= 1
    assert 1e8 < found[0]["bytes_fixed"] < found[0]["free"]


@pytest.mark.slow
def test_the_memory_of_this_process_is_not_counted(tiny_policy: Path) -> None:
    setting = cost.probe_settings(str(tiny_policy), 64, bf16=False)[0]
    row = {name: world(0, 1)[0][name] for name in ("prompt", "chosen", "rejected")}
    before = cost._run(setting, row)["bytes"]
    ballast = np.ones(300_000_000)  # 2.4 GB, more than the probe takes
    after = cost._run(setting, row)["bytes"]
    assert ballast.nbytes > after and abs(after - before) < 0.2 * before
