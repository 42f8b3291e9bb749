"""Reference log-probs: cached, keyed by everything they depend on, resumed after a stop."""

import copy
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from align.config.columns import ID_COLUMNS
from align.io.files import read_json, write_json
from align.models.fingerprint import reference_key
from align.models.layout import LayoutChoice
from align.models.loading import load_policy
from align.models.logps import pair_logps
from align.training.distinct_responses import distinct_passes
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import causal, rows, trained_adapter
from tests.training.test_trainer import ours


@pytest.mark.parametrize("peft", [None, LoraConfig(r=2, target_modules=["q_proj"]),
                                  LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")])  # fmt: skip
def test_the_weights_of_a_folder_are_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peft: LoraConfig | None
) -> None:
    """The key is that of a model that was given, and another one once the files are; PiSSA changes the base's weights,
    which are hashed each time."""
    folder = causal(tmp_path / "policy")
    table = Dataset.from_dict({name: [[1, 2, 3]] for name in ID_COLUMNS})
    read: list[int] = []

    def key(source: Path | None) -> str:
        model = load_policy(str(folder), dtype="float32")
        adapted = model if peft is None else get_peft_model(model, copy.deepcopy(peft))
        contiguous = torch.Tensor.contiguous
        monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: (read.append(1), contiguous(self))[1])
        found = reference_key(adapted, table, ["a"], with_adapter=False, folder=source)
        monkeypatch.undo()
        return found

    first, many = key(folder), len(read)
    second, again = key(folder), len(read) - many
    assert many > 0 and again == (many if peft is not None and peft.init_lora_weights == "pissa" else 0)
    if peft is None or peft.init_lora_weights is True:
        assert first == second == key(None)
    causal(folder, seed=1)
    assert key(folder) not in (first, second)


def test_a_stopped_computation_resumes(tiny_policy: Path, tmp_path: Path) -> None:
    """Only batches with missing rows are computed again: rows of the others keep the mark 7.0."""
    first = ours(tiny_policy, tmp_path, budget=40)
    (file,) = (tmp_path / "cache").iterdir()
    complete = np.load(file)
    assert complete.shape == (16, 2) and np.isfinite(complete).all()
    partial = np.full_like(complete, 7.0)
    partial[[3, 9]] = np.nan
    np.save(file.with_suffix(".partial.npy"), partial)
    file.unlink()
    again = ours(tiny_policy, tmp_path, budget=40)
    (file,) = (tmp_path / "cache").iterdir()
    resumed = np.load(file)
    kept = (resumed == 7.0).all(axis=1)
    assert 0 < kept.sum() < 15 and not kept[[3, 9]].any()
    assert np.allclose(resumed[~kept], complete[~kept], atol=1e-5)
    assert again.train_dataset["ref_rejected_logps"] == resumed[:, 1].tolist()
    assert first.train_dataset["ref_rejected_logps"] == complete[:, 1].tolist()


def test_reference_log_probs_are_cached_by_model_and_pairs(tiny_policy: Path, tmp_path: Path) -> None:
    first = ours(tiny_policy, tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    stamp = file.stat().st_mtime_ns
    again = ours(tiny_policy, tmp_path, "mmpo")
    assert file.stat().st_mtime_ns == stamp and len(list((tmp_path / "cache").iterdir())) == 1
    assert again.train_dataset["ref_chosen_logps"] == first.train_dataset["ref_chosen_logps"]
    ours(tiny_policy, tmp_path, pairs=Dataset.from_list(rows(15)))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_another_config_is_another_reference(tiny_policy: Path, tmp_path: Path) -> None:
    """The same weights compute other log-probs under another config."""
    shutil.copytree(tiny_policy, tmp_path / "rotated")
    config = read_json(tmp_path / "rotated" / "config.json")
    config["rope_parameters"]["rope_theta"] = 10.0
    write_json(tmp_path / "rotated" / "config.json", config)
    trainers = [ours(tiny_policy, tmp_path), ours(tiny_policy, tmp_path, "ipo")]
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    trainers.append(ours(tmp_path / "rotated", tmp_path))
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    first, second, third = (trainer.train_dataset["ref_chosen_logps"][:] for trainer in trainers)
    assert first == second and not np.allclose(first, third, atol=0.1)


def test_an_adapter_that_is_trained_further_is_part_of_the_cached_reference(tiny_policy: Path, tmp_path: Path) -> None:
    """Another adapter in the same folder has other reference log-probs: at the start they are the policy's own."""
    for seed in (1, 2):
        trained_adapter(tiny_policy, tmp_path / "adapter", seed)
        trainer = ours(tmp_path / "adapter", tmp_path)
        batch = trainer.data_collator([trainer.train_dataset[k] for k in range(4)])
        trainer.model.eval()
        with torch.no_grad():
            logps = pair_logps(trainer.model, batch, trainer.layout)
        assert torch.allclose(logps.chosen, batch["ref_chosen_logps"], atol=1e-4)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def several_pairs() -> list[dict[str, Any]]:
    """All 6 pairs of 4 responses, 2 pairs that share a response, and a prompt with one pair."""
    responses = [" good film", " great good film", " bad plot", " awful bad plot"]
    table = [("the", a, b) for a, b in itertools.combinations(responses, 2)]
    table += [("a film is", " good", " bad"), ("the plot is", " great", " awful"), ("a film is", " good", " awful")]
    return [
        {"id": f"p{k}", "prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": 1.0}
        for k, (prompt, chosen, rejected) in enumerate(table)
    ]


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
def test_a_response_in_several_pairs_is_computed_once(
    tiny_policy: Path, tmp_path: Path, layout: LayoutChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs are those of each pair alone; 4 responses in 6 pairs take 2 passes, 3 in 2 take 2, a pair 1."""
    computed: list[int] = []
    real = PreferenceTrainer.compute_ref_log_probs

    def counting(self: PreferenceTrainer, model: Any, inputs: dict[str, Any]) -> Any:
        computed.append(len(inputs["input_ids"]) // 2)
        return real(self, model, inputs)

    monkeypatch.setattr(PreferenceTrainer, "compute_ref_log_probs", counting)
    table = several_pairs()
    trainer = ours(tiny_policy, tmp_path, pairs=Dataset.from_list(table), layout=layout)
    assert sum(computed) == 5
    assert [file.suffixes for file in (tmp_path / "cache").iterdir()] == [[".npy"]]
    for row in trainer.train_dataset:
        pair = {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        alone = [value.item() for value in real(trainer, trainer.model, trainer.data_collator([pair]))]
        assert [row["ref_chosen_logps"], row["ref_rejected_logps"]] == pytest.approx(alone, abs=1e-5)


def test_pairs_without_common_responses_are_computed_as_they_are() -> None:
    table = Dataset.from_dict(
        {
            "prompt_ids": [[1], [2], [1], [2]],
            "chosen_ids": [[3], [4], [5], [6]],
            "rejected_ids": [[4], [3], [6, 6], [5]],
        }
    )
    passes = distinct_passes(table)
    assert not passes.repeats and passes.places.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert passes.source.ravel().tolist() == list(range(8)) and passes.lengths(table) == [3, 3, 4, 3]
    assert passes.example(table, 2) == {"prompt_ids": [1], "chosen_ids": [5], "rejected_ids": [6, 6]}


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=12))
def test_every_response_finds_itself_among_the_passes(drawn: list[tuple[int, int, int]]) -> None:
    """A pass is of one prompt; no more passes than pairs, and the fewest that hold the responses of each prompt."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    table = Dataset.from_list([dict(zip(names, ([a] * a, [b] * b, [c] * c), strict=True)) for a, b, c in drawn])
    passes = distinct_passes(table)
    examples = [passes.example(table, k) for k in range(len(passes.places))]
    found = [(len(one["prompt_ids"]), len(one[side])) for one in examples for side in names[1:]]
    assert [[found[k] for k in row] for row in passes.source] == [[(a, b), (a, c)] for a, b, c in drawn]
    distinct = [{of for a, b, c in drawn if a == prompt for of in (b, c)} for prompt in {a for a, _, _ in drawn}]
    assert len(examples) == sum(-(-len(of) // 2) for of in distinct) <= len(drawn)


def test_passes_of_distinct_responses_resume_after_a_stop(tiny_policy: Path, tmp_path: Path) -> None:
    """Rows of the unfinished file are passes; marks of finished ones reach every pair that has their responses."""
    pairs = Dataset.from_list(several_pairs())
    ours(tiny_policy, tmp_path, pairs=pairs)
    (file,) = (tmp_path / "cache").iterdir()
    complete = np.load(file)
    file.unlink()
    partial = np.full((5, 2), 7.0)
    partial[0] = np.nan  # the first two responses of the first prompt
    np.save(file.with_suffix(".distinct.partial.npy"), partial)
    ours(tiny_policy, tmp_path, pairs=pairs, budget=1)
    (file,) = (tmp_path / "cache").iterdir()
    found = np.load(file)
    assert np.allclose(found[0], complete[0], atol=1e-5) and np.allclose(found[1:3, 0], complete[1:3, 0], atol=1e-5)
    assert (found[5:] == 7.0).all() and (found[1:5, 1] == 7.0).sum() == 4
