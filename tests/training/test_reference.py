"""Reference log-probs: cached, keyed by everything they depend on, resumed after a stop."""

import shutil
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from align.io.files import read_json, write_json
from align.models.logps import pair_logps
from tests.helpers.builders import rows, trained_adapter
from tests.training.test_trainer import ours


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
