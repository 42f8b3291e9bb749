"""`align entangle influence` and ``measure_influence``: table, page, runs, resuming, and what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from align import measure_influence
from align.commands import influence as commands
from align.commands.influence import InfluenceSettings, influence
from align.config import PairsSection
from align.entanglement.adam_states import learning_rate, read_adam_state
from align.entanglement.influence_summary import Point, combine, sentence, summarize
from align.errors import AlignError, ConfigError, DataError, ModelError
from align.io.files import read_json
from align.models.loading import load_policy
from tests.helpers.builders import causal, make_base, rows
from tests.helpers.command_line import jsonl


def written(folder: Path, count: int = 8, held: int = 5) -> None:
    table = [row | {"source": "<b>web</b>" if k % 2 else "books"} for k, row in enumerate(rows(count + held))]
    jsonl(folder / "pairs.jsonl", table[:count])
    jsonl(folder / "held.jsonl", [row | {"group": "ab"[k % 2]} for k, row in enumerate(table[count:])])


def measured(folder: Path, policy: Path, held: str = "held.jsonl", check: bool = False, **fields: Any) -> None:
    settings = InfluenceSettings(str(policy), **fields)
    sources = (PairsSection(path=str(folder / name)) for name in ("pairs.jsonl", held))
    influence(*sources, settings, folder / "out", check=check)


def like_a_run(folder: Path, policy: Path, steps: tuple[int, ...] = (2, 4), **loss: Any) -> Path:
    """A folder like that of a finished training with the policy as every checkpoint."""
    training = folder / "run" / "train-dpo"
    for step in steps:
        shutil.copytree(policy, training / "checkpoints" / f"checkpoint-{step}")
    Dataset.from_list(rows(3)).to_parquet(str(folder / "run" / "filter" / "kept.parquet"))
    inputs = {"settings": {"model": str(policy), "trainer": {}}, "after": {"filter": "0"},
              "loss": {"loss": "dpo", "parameters": {"beta": 0.1}} | loss}  # fmt: skip
    training.mkdir(exist_ok=True, parents=True)
    (training / "manifest.json").write_text(json.dumps({"key": "0", "seconds": 1, "inputs": inputs}))
    logged = [{"step": step, "learning_rate": step * 1e-3, "loss": 1.0} for step in range(1, 5)]
    (training / "history.json").write_text(json.dumps({"history": logged}))
    return folder / "run"


def test_table_page_and_python_agree_and_nothing_is_measured_twice(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path)
    measured(tmp_path, tiny_policy)
    table = Dataset.from_parquet(str(tmp_path / "out" / "influence.parquet"))
    report = read_json(tmp_path / "out" / "influence.json")
    pairs, held = (Dataset.from_json(str(tmp_path / name)) for name in ("pairs.jsonl", "held.jsonl"))
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="float32")
    found = measure_influence(model, AutoTokenizer.from_pretrained(tiny_policy), pairs, held)
    for name in ("influence", "influence_chosen", "influence_rejected", "influence@a", "influence_rejected@b"):
        assert table[name] == pytest.approx(found[name], rel=1e-4, abs=1e-5), name
    assert {row["value"]: row["pairs"] for row in report["by"]["source"]} == {"<b>web</b>": 4, "books": 4}
    total = sum(row["sum"]["value"] for row in report["by"]["source"])
    assert total == pytest.approx(sum(table["influence"])) == pytest.approx(report["all"]["sum"]["value"])
    assert report["all"]["chosen"] + report["all"]["rejected"] == pytest.approx(report["all"]["sum"]["value"])
    page = (tmp_path / "out" / "influence.html").read_text()
    assert "not a filter score" in page and "only 5 held-out pairs" in page and "optimizer.pt" in page
    assert "<script" not in page and "<b>web" not in page and "&lt;b&gt;web" in page
    monkeypatch.setattr(commands, "load_measured", None)
    measured(tmp_path, tiny_policy)  # from the finished stage


def test_a_stopped_measurement_goes_on(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shards that were finished are not computed again, and the result is that of one go."""
    written(tmp_path)
    measured(tmp_path, tiny_policy)
    whole = Dataset.from_parquet(str(tmp_path / "out" / "influence.parquet"))["influence"]
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(commands, "SHARD", 3)
    calls: list[int] = []
    plain = commands.InfluenceMeasurement.__call__

    def stops(self: Any, some: Dataset) -> Dataset:
        calls.append(len(some))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, some)

    monkeypatch.setattr(commands.InfluenceMeasurement, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, tiny_policy)
    measured(tmp_path, tiny_policy)
    assert calls == [3, 3, 2, 2]
    assert Dataset.from_parquet(str(tmp_path / "out" / "influence.parquet"))["influence"] == pytest.approx(whole)


def test_checkpoints_count_by_their_learning_rates(tiny_policy: Path, tmp_path: Path) -> None:
    """Equal checkpoints: the sum of the mean rates logged before each, 1.5e-3 and 3.5e-3."""
    written(tmp_path)
    measured(tmp_path, tiny_policy)
    plain = np.array(Dataset.from_parquet(str(tmp_path / "out" / "influence.parquet"))["influence"])
    shutil.rmtree(tmp_path / "out")
    measured(tmp_path, tiny_policy, run=like_a_run(tmp_path, tiny_policy, token_mask={"sparsity": 0.1}), method="dpo")
    found = Dataset.from_parquet(str(tmp_path / "out" / "influence.parquet"))["influence"]
    assert found == pytest.approx(5e-3 * plain, rel=1e-4, abs=1e-7)
    report = read_json(tmp_path / "out" / "influence.json")
    assert [point["learning_rate"] for point in report["points"]] == pytest.approx([1.5e-3, 3.5e-3])
    assert any("not counted: token_mask" in line for line in report["run"]["told"])


def test_the_rate_of_a_checkpoint_without_a_logged_step_is_the_nearest(tmp_path: Path) -> None:
    assert learning_rate(tmp_path, 0, 4) is None
    logged = [{"step": 3, "learning_rate": 0.5}, {"step": 9, "learning_rate": 0.1}]
    (tmp_path / "history.json").write_text(json.dumps({"history": logged}))
    assert (learning_rate(tmp_path, 0, 4), learning_rate(tmp_path, 4, 8)) == (0.5, 0.1)


def test_the_state_of_a_trainer_is_read_in_its_order(tiny_policy: Path, tmp_path: Path) -> None:
    """As transformers orders it: parameters with weight decay first, then norms."""
    model = load_policy(str(tiny_policy), trainable=True, dtype="float32")
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    norms = [name for name in named if "norm" in name]
    order = [name for name in named if name not in norms] + norms
    groups = [{"params": [named[name] for name in order[: -len(norms)]]}, {"params": [named[name] for name in norms]}]
    adam = torch.optim.AdamW(groups, betas=(0.8, 0.99))
    for k, name in enumerate(named):
        named[name].grad = torch.full_like(named[name], k + 1.0)
    adam.step()
    torch.save(adam.state_dict(), tmp_path / "optimizer.pt")
    state = read_adam_state(tmp_path, model, named)
    assert not isinstance(state, str) and state.betas == (0.8, 0.99) and state.step == 1
    for k, name in enumerate(named):
        assert state.second[name].shape == named[name].shape
        assert float(state.second[name].mean()) == pytest.approx(0.01 * (k + 1) ** 2, rel=1e-4), name
    found = state.precondition({name: torch.ones_like(value) for name, value in named.items()})
    assert float(found[norms[0]].mean()) == pytest.approx(1 / (list(named).index(norms[0]) + 1), rel=1e-3)
    with pytest.raises(ModelError, match=r"influence-checkpoint.*of another model"):
        other = load_policy(str(tiny_policy), trainable=True, dtype="float32")
        other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight[:5].clone())
        read_adam_state(tmp_path, other, dict(other.named_parameters()))
    (tmp_path / "optimizer.pt").write_bytes(b"no")
    assert "cannot be read" in str(read_adam_state(tmp_path, model, named))


def test_a_checkpoint_with_its_optimizer_gives_both_kinds(tiny_policy: Path, tmp_path: Path) -> None:
    policy = tmp_path / "checkpoint"
    shutil.copytree(tiny_policy, policy)
    model = load_policy(str(policy), trainable=True, dtype="float32")
    named = dict(model.named_parameters())
    norms = [value for name, value in named.items() if "norm" in name]
    adam = torch.optim.AdamW([{"params": [v for n, v in named.items() if "norm" not in n]}, {"params": norms}])
    for value in named.values():
        value.grad = torch.full_like(value, 0.5)
    adam.step()
    torch.save(adam.state_dict(), policy / "optimizer.pt")
    written(tmp_path)
    measured(tmp_path, policy)
    table = Dataset.from_parquet(str(tmp_path / "out" / "influence.parquet"))
    assert table["adamw"] == pytest.approx(2 * np.array(table["influence"]), rel=1e-3, abs=1e-4)  # |g| is 0.5
    assert read_json(tmp_path / "out" / "influence.json")["kind"] == "adamw"


def test_likelihood_of_given_answers(tiny_policy: Path, tmp_path: Path) -> None:
    """The same as the nll of pairs with these chosen responses; the placeholder does not matter."""
    written(tmp_path)
    held = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    jsonl(tmp_path / "answers.jsonl", [{"prompt": row["prompt"], "response": row["chosen"]} for row in held])
    measured(tmp_path, tiny_policy, "answers.jsonl", target="likelihood")
    table = Dataset.from_parquet(str(tmp_path / "out" / "influence.parquet"))
    pairs = Dataset.from_json(str(tmp_path / "pairs.jsonl"))
    found = measure_influence(str(tiny_policy), None, pairs, held, target="nll")
    assert table["influence"] == pytest.approx(found["influence"], rel=1e-4, abs=1e-5)


def test_check_writes_how_true_it_is(tiny_policy: Path, tmp_path: Path) -> None:
    written(tmp_path, 4, 2)
    measured(tmp_path, tiny_policy, check=True)
    found = read_json(tmp_path / "out" / "influence-check.json")
    assert found["adamw"]["steps"][0]["pearson"] > 0.99 and len(found["sgd"]["steps"][0]["changes"]) == 4


def test_what_is_told_and_left_out(tiny_policy: Path, tmp_path: Path) -> None:
    """Held-out pairs that are trained on are left out; groups of a single pair are measured together."""
    written(tmp_path)
    held = [row | {"group": name} for row, name in zip(rows(13)[7:], "aaabcc", strict=True)]
    jsonl(tmp_path / "mixed.jsonl", held)
    measured(tmp_path, tiny_policy, "mixed.jsonl")
    report = read_json(tmp_path / "out" / "influence.json")
    assert [(group["name"], group["pairs"]) for group in report["groups"]] == [("a", 2), ("groups of one", 1), ("c", 2)]
    told = "\n".join(report["run"]["told"])
    assert "1 of 6 held-out pairs are training pairs as well, left out: p7" in told and "of a single pair" in told


def test_pairs_with_the_padding_token_of_a_tied_model_are_told(tmp_path: Path) -> None:
    """Here it is a word; the page says so also when everything was measured before."""
    base = make_base(tmp_path / "tied", tied=True)
    words = AutoTokenizer.from_pretrained(base)
    written(tmp_path)
    tables = [Dataset.from_json(str(tmp_path / name)) for name in ("pairs.jsonl", "held.jsonl")]
    texts = [[row["prompt"] + row["chosen"] + row["rejected"] for row in table] for table in tables]
    word = texts[0][0].split()[0]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": words.convert_tokens_to_ids(word)}))
    counts = [sum(word in text.split() for text in some) for some in texts]
    assert counts[0] > 0
    for _ in range(2):
        measured(tmp_path, base)
        told = "\n".join(read_json(tmp_path / "out" / "influence.json")["run"]["told"])
        assert f"{counts[0]} pairs and {counts[1]} held-out pairs hold the padding token of a model with tied" in told


@pytest.mark.parametrize(
    ("fields", "held", "message"),
    [
        ({}, "pairs.jsonl", r"influence-overlap.*8 of 8 held-out pairs are training pairs"),
        ({"run": Path("nowhere")}, "held.jsonl", r"--run and --method: found one of them"),
        ({"run": Path("nowhere"), "method": "dpo"}, "held.jsonl", r"trace-missing"),
        ({"loss": "beta_dpo"}, "held.jsonl", r"entanglement-loss"),
        ({"target": "nlll"}, "held.jsonl", r"loss-name.*nlll"),
        ({"by": ("no",)}, "held.jsonl", r"data-column.*--by no: found no such column"),
        ({"target": "likelihood"}, "empty.jsonl", r"data-column.*expected one of the answer"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], held: str, message: str, tiny_policy: Path, tmp_path: Path) -> None:
    written(tmp_path)
    jsonl(tmp_path / "empty.jsonl", [{"prompt": "a", "text": "b"}])
    with pytest.raises(AlignError, match=message):
        measured(tmp_path, tiny_policy, held, **fields)


def test_a_run_without_checkpoints_or_of_another_model(tiny_policy: Path, tmp_path: Path) -> None:
    written(tmp_path)
    run = like_a_run(tmp_path, tiny_policy)
    other = causal(tmp_path / "other", seed=3)
    with pytest.raises(ModelError, match=r"influence-checkpoint.*another model than"):
        measured(tmp_path, other, run=run, method="dpo")
    with pytest.raises(ConfigError, match="--loss ipo: found another loss than dpo"):
        measured(tmp_path, tiny_policy, run=run, method="dpo", loss="ipo")
    (run / "train-dpo" / "history.json").unlink()
    with pytest.raises(ModelError, match=r"influence-checkpoint.*logged no learning rate"):
        measured(tmp_path, tiny_policy, run=run, method="dpo")
    shutil.rmtree(run / "train-dpo" / "checkpoints")
    with pytest.raises(DataError, match=r"trace-checkpoints"):
        measured(tmp_path, tiny_policy, run=run, method="dpo")


def made(values: list[float], prompts: list[str]) -> dict[str, Any]:
    count = len(values)
    parts = {"influence": values, "influence_chosen": values, "influence_rejected": [0.0] * count}
    pairs = Dataset.from_list([{"id": str(k), "prompt": p, "chosen": "a", "rejected": "b", "source": "s"}
                               for k, p in enumerate(prompts)])  # fmt: skip
    tokens = Dataset.from_dict({"chosen_ids": [[1]] * count, "rejected_ids": [[1]] * count})
    held = {"groups": [{"name": "all", "pairs": 4, "loss": 0.5}], "adam": None}
    one = [(Dataset.from_dict({"id": pairs["id"], **parts}), held)]
    points = [Point("model", None, "m", None, 1.0, None)]
    return summarize(combine(one, points, pairs, tokens), one, points, (), 3)


def test_intervals_are_over_prompts_and_claims_need_them() -> None:
    values = [1.0, 1.1, 0.9, 1.2, 1.05, 0.95, 1.0, 1.15, 0.9, 1.25]
    many = made(values, [f"p{k}" for k in range(10)])
    low, high = many["all"]["sum"]["low"], many["all"]["sum"]["high"]
    assert low < sum(values) < high and low > 8 and "all together raise it" in many["sentence"]
    assert "Raised by: source s" in sentence(many)
    few = made(values, [f"p{k % 2}" for k in range(10)])
    assert "not decided" in few["sentence"] and "Raised by" not in few["sentence"] and few["by"]["source"][0]["few"]
    assert [row["id"] for row in many["raising"]] == ["9", "3", "7"] and many["lowering"] == []
