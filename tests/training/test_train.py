"""train_policy: what it writes, adapters that are trained further, gaps in columns, entanglement along training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import GenerationConfig

from align.commands.entangle import sample_pairs
from align.config import EntanglementSection, LossSection, TrainSection
from align.errors import ConfigError, DataError
from align.generation.encoding import stop_ids, to_completion
from align.io.files import read_json
from align.models.collator import ROW
from align.models.loading import load_policy, load_tokenizer
from align.training.loss_choice import bind
from align.training.train import MODEL, attach_probe, make_trainer, train_policy
from tests.helpers.builders import causal, rows, trained_adapter
from tests.training.test_trainer import FIELDS, ours


def test_saved_policy_and_history(tiny_policy: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    config = TrainSection(model=str(tiny_policy), methods={"x": LossSection(loss="madpo")}, trainer=FIELDS, peft=lora)
    train_policy(Dataset.from_list(rows(8)), config, "x", tmp_path, seed=0)
    adapter = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in adapter.items())
    history = read_json(tmp_path / "history.json")
    assert [entry["step"] for entry in history["history"]] == [1, 2, 3, 4]
    assert {"rewards/margins", "weight/mean", "weight/ess_share"} <= set(history["history"][0])


@pytest.mark.parametrize("fields", [{}, {"precompute_ref_log_probs": False}, {"gradient_checkpointing": True}])
def test_an_adapter_is_trained_further_under_every_method(
    tiny_policy: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    """Also if the reference log-probs are cached already, as for all methods but the first."""
    trained_adapter(tiny_policy, tmp_path / "adapter", 1)
    start = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = TrainSection(
        model=str(tmp_path / "adapter"),
        methods={"dpo": LossSection(loss="dpo"), "ipo": LossSection(loss="ipo")},
        trainer=FIELDS | {"max_steps": 2} | fields,
    )
    for method in config.methods:
        train_policy(
            Dataset.from_list(rows(8)), config, method, tmp_path / method, seed=0, reference_cache=tmp_path / "cache"
        )
        trained = load_file(tmp_path / method / "model" / "adapter_model.safetensors")
        assert trained.keys() == start.keys()
        assert all(not torch.equal(trained[name], value) for name, value in start.items()), method
    trainer = ours(tmp_path / "adapter", tmp_path)
    learning = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert learning and all(".default." in name for name in learning)


def test_pairs_without_a_margin_or_weight(tiny_policy: Path, tmp_path: Path) -> None:
    """A loss that reads margins names the pair; for a loss that reads none, gaps change nothing."""
    table = rows(8)
    holes = [row | {"margin": None} if row["id"] == "p3" else row for row in table]
    weighted = [row | {"weight": None if row["id"] == "p5" else 1.0} for row in table]
    config = TrainSection(
        model=str(tiny_policy),
        methods={"dpo": LossSection(loss="dpo"), "madpo": LossSection(loss="madpo")},
        trainer=FIELDS | {"max_steps": 2},
    )
    message = r"\[loss-needs-margin\] margin: 1 of 8 pairs have none, the first 'p3'; expected one for each"
    with pytest.raises(DataError, match=message):
        train_policy(Dataset.from_list(holes), config, "madpo", tmp_path / "madpo", seed=0)
    with pytest.raises(DataError, match=r"\[weights-column\] weight: found no value for some pairs"):
        train_policy(Dataset.from_list(weighted), config, "dpo", tmp_path / "weighted", seed=0)
    train_policy(Dataset.from_list(holes), config, "dpo", tmp_path / "holes", seed=0)
    train_policy(Dataset.from_list(table), config, "dpo", tmp_path / "complete", seed=0)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("holes", "complete")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_probes_are_a_fair_sample_in_any_order(tiny_policy: Path, tmp_path: Path) -> None:
    """Three of eight pairs, those of `align entangle --limit 3`, whatever rows are first and whatever is left out."""
    table = [row | {"id": f"{k // 4}-{k}"} for k, row in enumerate(rows(8))]
    probes = EntanglementSection(probes=3)
    config = TrainSection(
        model=str(tiny_policy), methods={"m": LossSection(loss="dpo")}, trainer=FIELDS, entanglement=probes
    )
    loss = bind("m", config.methods["m"])
    expected = set(sample_pairs(Dataset.from_list(table), loss, 3, "pairs")["id"])
    for number, order in enumerate((table, table[::-1])):
        trainer = make_trainer(Dataset.from_list(order), config, "m", tmp_path / str(number), seed=0)
        callback = attach_probe(trainer, config, tmp_path / f"{number}.json")
        assert callback is not None
        assert {trainer.guard.ids[row] for row in callback.probes[ROW].tolist()} == expected
    assert expected != {row["id"] for row in table[:3]} and expected != {row["id"] for row in table[-3:]}


def test_entanglement_along_training(tiny_policy: Path, tmp_path: Path) -> None:
    """Measuring does not change the training, and its predictions agree with the changes that the steps made."""
    weights = {}
    for name, probing in (("plain", None), ("measured", EntanglementSection(every=2, probes=6))):
        config = TrainSection(
            model=str(tiny_policy),
            methods={"m": LossSection(loss="ipo")},
            trainer=FIELDS | {"learning_rate": 1e-3},
            entanglement=probing,
        )
        train_policy(Dataset.from_list(rows(8)), config, "m", tmp_path / name, seed=0)
        weights[name] = load_file(tmp_path / name / "model" / "model.safetensors")
    assert all(torch.equal(weights["plain"][key], value) for key, value in weights["measured"].items())
    records = read_json(tmp_path / "measured" / "history.json")["entanglement"]
    assert [record["step"] for record in records] == [1, 3]
    for record in records:
        for key in ("", "batch_"):
            assert record[f"{key}sign_agreement"] > 0.8
            assert record[f"{key}realised_chosen"] == pytest.approx(record[f"{key}predicted_chosen"], rel=0.3)
            assert 0 <= record[f"{key}fell"] <= 1
        assert 0 <= record["entangled"] <= 1 and record["norm_ratio"] > 0
    assert records[0]["chosen_change"] == pytest.approx(0.0, abs=1e-4)
    with pytest.raises(ConfigError, match=r"train.entanglement: needs one process"):
        beta = config.model_copy(update={"methods": {"m": LossSection(loss="beta_dpo")}})
        train_policy(Dataset.from_list(rows(8)), beta, "m", tmp_path / "beta", seed=0)


@pytest.mark.parametrize("peft", [None, {"r": 2, "target_modules": ["q_proj"]}])
def test_a_trained_policy_ends_where_its_start_ends(peft: dict[str, Any] | None, tmp_path: Path) -> None:
    """A model with several ends, like Llama 3: training takes none of them away, and sampling stops at each."""
    start = causal(tmp_path / "start")
    GenerationConfig(eos_token_id=[1, 7, 9], pad_token_id=0).save_pretrained(start)
    config = TrainSection(
        model=str(start), methods={"x": LossSection(loss="dpo")}, trainer=FIELDS | {"max_steps": 1}, peft=peft
    )
    train_policy(Dataset.from_list(rows(8)), config, "x", tmp_path / "out", seed=0)
    for folder in (start, tmp_path / "out" / MODEL):
        tokenizer, model = load_tokenizer(str(folder)), load_policy(str(folder), dtype="float32")
        stops = stop_ids(tokenizer, model.generation_config)
        assert stops == [1, 7, 9]
        for end in stops:
            completion = to_completion(tokenizer, [4], [5, end, 6], stops, None)
            assert (completion.token_ids, completion.finish_reason) == ([5, end], "stop")
        assert to_completion(tokenizer, [4], [5, 6], stops, None).finish_reason == "length"
