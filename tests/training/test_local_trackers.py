"""MLflow, trackio and W&B themselves, where they are installed, each in its mode without a network."""

import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from align.training.base.tracked_runs import log_figures, tracked_run
from align.training.train import train_policy
from tests.training.test_tracked_runs import PAIRS, config

METHODS = ("plain", "weighted")


def track(policy: Path, folder: Path, tracker: str) -> None:
    """Train two methods with this tracker, and log a figure of the evaluation into the first one's run."""
    for method in METHODS:
        run = tracked_run(folder, "demo", method)
        train_policy(PAIRS, config(policy, tracker), method, folder / method, seed=0, run=run)
    run = tracked_run(folder, "demo", METHODS[0])
    args: Any = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    log_figures(run, lambda: args, {"kl": 0.25})


@pytest.fixture
def environment() -> Iterator[pytest.MonkeyPatch]:
    """Variables that a tracker sets while it runs are gone afterwards."""
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    for name in set(os.environ) - set(before):
        del os.environ[name]


def test_mlflow_in_a_local_store(tiny_policy: Path, tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}" if _has("sqlalchemy") else (tmp_path / "mlruns").as_uri()
    environment.setenv("MLFLOW_TRACKING_URI", uri)
    environment.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    environment.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(uri)
    track(tiny_policy, tmp_path, "mlflow")
    runs = {run.info.run_name: run for run in mlflow.search_runs(experiment_names=["tests"], output_format="list")}
    assert sorted(runs) == ["demo-plain", "demo-weighted"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {run.data.tags["group"] for run in runs.values()} == {"demo"}
    assert runs["demo-weighted"].data.params["align.loss"] == "madpo"
    assert runs["demo-plain"].data.metrics["final/kl"] == 0.25
    losses = mlflow.MlflowClient().get_metric_history(runs["demo-plain"].info.run_id, "loss")
    assert [one.step for one in losses] == [1, 2]


def test_trackio_in_a_local_folder(tiny_policy: Path, tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is imported
    pytest.importorskip("trackio")
    track(tiny_policy, tmp_path, "trackio")
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
    logged = [(run, json.loads(text)) for run, text in rows]
    for name in ("demo-plain", "demo-weighted"):
        steps = [found["train/global_step"] for run, found in logged if run == name and "train/loss" in found]
        assert steps == [1, 2]
    assert [found["final/kl"] for run, found in logged if run == "demo-plain" and "final/kl" in found] == [0.25]


def test_wandb_offline(tiny_policy: Path, tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    environment.setenv("WANDB_MODE", "offline")
    environment.setenv("WANDB_DIR", str(tmp_path))
    track(tiny_policy, tmp_path, "wandb")
    assert len({path.name for path in (tmp_path / "wandb").glob("offline-run-*")}) >= len(METHODS)


def _has(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True
