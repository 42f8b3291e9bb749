"""Several processes give what one gives: pairs per step, weights, scores, products; no pair is lost or repeated."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from align.data.pairs import read_pairs
from tests.helpers.builders import bert_reward, causal, llama_reward
from tests.helpers.builders import rows as pairs
from tests.helpers.command_line import jsonl
from tests.helpers.launching import ROOT, launched

SEVERAL = [2, pytest.param(4, marks=pytest.mark.slow)]
GLOBAL_BATCH = 4
PAIRS = 18
"""Not divisible by the pairs per step: the last step of an epoch has two, so one of two processes may get none."""
STEPS = 20
DIES_IN = 8
"""Step in which tests.helpers.dying_cli dies."""
TOLERANCE = 1e-5
SMALL: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False}


def run_file(folder: Path, name: str, processes: int, **sections: Any) -> str:
    """A run with ``GLOBAL_BATCH`` pairs a step over the processes."""
    batch = {"per_device_train_batch_size": GLOBAL_BATCH // processes}
    for section in sections.values():
        if "trainer" in section:
            section["trainer"] = SMALL | batch | section["trainer"]
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"name": name, "pairs": {"path": "pairs.jsonl"}, **sections}))
    return file.name


def used(folder: Path, processes: int) -> list[list[str]]:
    """Ids of the pairs of each optimizer step over all processes; deletes the records."""
    files = [folder / f"used-{rank}.jsonl" for rank in range(processes)]
    ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for file in files:
        file.unlink()
    return [[name for part in step for name in part] for step in zip(*ranks, strict=True)]


def assert_whole_epochs(steps: list[list[str]], count: int) -> None:
    """Every epoch has every pair once."""
    epoch = -(-count // GLOBAL_BATCH)
    assert len(steps) % epoch == 0
    for start in range(0, len(steps), epoch):
        seen = Counter(name for step in steps[start : start + epoch] for name in step)
        assert seen == Counter(f"p{k}" for k in range(count))


def assert_same_weights(one: Path, other: Path, tolerance: float = TOLERANCE, kind: str = "model") -> None:
    """The weights of two model or adapter folders."""
    left, right = (load_file(folder / f"{kind}.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.allclose(value, right[name], atol=tolerance, rtol=0), name


def assert_same_columns(one: Dataset, other: Dataset, columns: list[str]) -> None:
    """The numbers of two tables with the same pairs."""
    assert one["id"] == other["id"]
    for column in columns:
        assert np.allclose(one[column], other[column], atol=TOLERANCE, equal_nan=True), column


def policies(folder: Path, name: str, processes: int, methods: dict[str, Any], steps: int) -> list[list[str]]:
    """Train with each method; returns the pairs of each step."""
    train = {"model": "policy", "methods": methods, "trainer": {"max_steps": steps, "learning_rate": 1e-3}}
    file = run_file(folder, name, processes, train=train)
    done = launched(processes, "train", file, cwd=folder, module="tests.helpers.recorded_cli")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("first pair as the model sees it") == len(methods)
    return used(folder, processes)


@pytest.mark.parametrize("processes", SEVERAL)
def test_training(tmp_path: Path, processes: int) -> None:
    """Twenty steps under each loss, some with statistics over all processes: four epochs, 18 pairs each."""
    start = causal(tmp_path / "policy")
    jsonl(tmp_path / "pairs.jsonl", pairs(PAIRS))
    methods: dict[str, Any] = {name: {"loss": loss} for name, loss in (("dpo", "dpo"), ("madpo", "madpo"))}
    methods |= {"beta": {"loss": "beta_dpo"}, "sum": {"loss": {"terms": {"aot_unpaired": 1.0, "bco": 0.5, "nll": 0.1}}}}
    one, several = (policies(tmp_path, name, n, methods, STEPS) for name, n in (("one", 1), ("several", processes)))
    for steps in (one, several):
        for method in range(len(methods)):
            assert_whole_epochs(steps[method * STEPS : (method + 1) * STEPS], PAIRS)
    assert [sorted(step) for step in one] == [sorted(step) for step in several]
    runs = tmp_path / "runs"
    for method in methods:
        model = runs / "one" / f"train-{method}" / "model"
        assert_same_weights(model, runs / "several" / f"train-{method}" / "model")
        with pytest.raises(AssertionError):
            assert_same_weights(start, model, 100 * TOLERANCE)
        ends = [json.loads((runs / run / f"train-{method}" / "history.json").read_text()) for run in ("one", "several")]
        last, other = (end["history"][-1] for end in ends)
        terms = ("loss/aot_unpaired", "loss/bco", "loss/nll", "delta") if method == "sum" else ()
        for name in ("loss", "rewards/margins", "weight/mean", "entropy", "num_tokens", *terms):
            assert last[name] == pytest.approx(other[name], rel=1e-3), name


@pytest.mark.parametrize("processes", SEVERAL)
def test_remedies(tmp_path: Path, processes: int) -> None:
    """Remedies per pair equal those of one process; remedies per batch see each process's pairs once."""
    causal(tmp_path / "policy")
    jsonl(tmp_path / "pairs.jsonl", pairs(PAIRS))
    methods: dict[str, Any] = {
        kind: {"loss": "dpo", "remedy": {"kind": kind}} for kind in ("hold_chosen", "normalise", "hold_batch")
    }
    methods |= {"calibrate": {"loss": "dpo", "remedy": {"kind": "calibrate", "decay": 0.5}}}
    methods |= {"mask": {"loss": "dpo", "token_mask": {}}}
    epochs = 2 * -(-PAIRS // GLOBAL_BATCH)
    one, several = (policies(tmp_path, name, n, methods, epochs) for name, n in (("one", 1), ("several", processes)))
    assert [sorted(step) for step in one] == [sorted(step) for step in several]
    assert_whole_epochs(several, PAIRS)
    runs = tmp_path / "runs"
    for method in ("hold_chosen", "normalise", "mask"):
        left, right = (runs / name / f"train-{method}" / "model" for name in ("one", "several"))
        assert_same_weights(left, right)
    last = json.loads((runs / "several" / "train-calibrate" / "history.json").read_text())["history"][-1]
    assert float(last["remedy/chosen"]) * float(last["remedy/rejected"]) == pytest.approx(1.0, rel=1e-4)


def whole_run(folder: Path, name: str, processes: int) -> list[list[str]]:
    """Reward model, cross-fitting, filter and a policy; the pairs of each step of the reward models and the policy."""
    reward = {
        "model": "backbone", "folds": 2, "max_length": 64, "eval_pairs": {"path": "heldout.jsonl"},
        "trainer": {"num_train_epochs": 2, "learning_rate": 1e-3, "optim": "sgd"},
    }  # fmt: skip
    filtering = {"keep": 0.75, "embeddings": "vectors.npy"}
    trainer = {"max_steps": 8, "optim": "sgd", "learning_rate": 1e-2}
    train = {"model": "policy", "layout": "concatenated", "methods": {"dpo": {"loss": "dpo"}}, "trainer": trainer}
    file = run_file(folder, name, processes, reward=reward, filter=filtering, train=train)
    done = launched(processes, "run", file, cwd=folder, module="tests.helpers.recorded_cli")
    assert done.returncode == 0, done.stderr
    return used(folder, processes)


@pytest.mark.parametrize("processes", SEVERAL)
def test_a_whole_run(tmp_path: Path, processes: int) -> None:
    """Reward model, folds, scores, filter and policy, with a last step of an epoch that leaves processes without pairs.

    The kept pairs are the same only if the margins, by which they are chosen, are.
    """
    causal(tmp_path / "policy")
    bert_reward(tmp_path / "backbone")
    table = [{name: value for name, value in row.items() if name != "margin"} for row in pairs(PAIRS)]
    jsonl(tmp_path / "pairs.jsonl", table)
    jsonl(tmp_path / "heldout.jsonl", [{**row, "prompt": f"not {row['prompt']}"} for row in table[:7]])
    vectors = np.random.default_rng(0).normal(size=(PAIRS, 8)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    one, several = whole_run(tmp_path, "one", 1), whole_run(tmp_path, "several", processes)
    again = launched(processes, "run", "several.yaml", cwd=tmp_path)
    assert again.returncode == 0 and "nothing to do" in again.stderr, again.stderr
    assert [sorted(step) for step in one] == [sorted(step) for step in several]
    assert_whole_epochs(one[: 2 * -(-PAIRS // GLOBAL_BATCH)], PAIRS)
    left, right = (tmp_path / "runs" / name for name in ("one", "several"))
    assert_same_weights(left / "reward" / "model", right / "reward" / "model")
    for fold in range(2):
        assert_same_weights(left / "crossfit" / f"fold-{fold}", right / "crossfit" / f"fold-{fold}")
    for where in ("reward/heldout", "reward/in_sample", "crossfit/pairs", "margins/pairs"):
        columns = ["reward_chosen", "reward_rejected", "margin"]
        assert_same_columns(read_pairs(left / where), read_pairs(right / where), columns)
    kept, same = (Dataset.from_parquet(str(run / "filter" / "kept.parquet")) for run in (left, right))
    assert_same_columns(kept, same, ["margin", "importance"])
    assert_same_weights(left / "train-dpo" / "model", right / "train-dpo" / "model")


@pytest.mark.parametrize("processes", SEVERAL)
def test_scoring_and_products(tmp_path: Path, processes: int) -> None:
    """`align reward score`, 1,100 pairs in three shards, and `align entangle report`, 70 pairs in three."""
    causal(tmp_path / "policy")
    llama_reward(tmp_path / "reward")
    jsonl(tmp_path / "pairs.jsonl", pairs(1100))
    found: dict[str, list[Dataset]] = {"scored": [], "measured": []}
    for name, count in (("one", 1), ("several", processes)):
        score = ["reward", "score", "pairs.jsonl", "--model", "reward", "--batch-tokens", "2000"]
        scored = launched(count, *score, "--output", f"scored-{name}", cwd=tmp_path)
        assert scored.returncode == 0, scored.stderr
        printed = scored.stdout[scored.stdout.index("{") :]  # torch 2.8 has gloo say there who has joined
        assert json.loads(printed)["n"] == 1100, "one process prints"
        found["scored"].append(read_pairs(tmp_path / f"scored-{name}"))
        report = ["entangle", "report", "pairs.jsonl", "--model", "policy", "--output", f"products-{name}"]
        report += ["--limit", "70"]
        measured = launched(count, *report, cwd=tmp_path)
        assert measured.returncode == 0, measured.stderr
        table = tmp_path / f"products-{name}" / "measurements" / "entanglement.parquet"
        found["measured"].append(Dataset.from_parquet(str(table)))
    assert_same_columns(*found["scored"], ["reward_chosen", "reward_rejected", "margin"])
    assert_same_columns(*found["measured"], ["chosen_sq", "rejected_sq", "inner", "cosine", "slack"])
    assert len(found["measured"][0]) == 70 and found["measured"][0]["verdict"] == found["measured"][1]["verdict"]


@pytest.mark.parametrize("processes", SEVERAL)
def test_a_process_that_dies_ends_the_run(tmp_path: Path, processes: int) -> None:
    """The last process gets SIGKILL; the launcher names it, the others say what they met first: that or its SIGTERM.

    It dies in the second epoch; the resumed run trains on what is left of it and ends in the same weights.
    """
    causal(tmp_path / "policy")
    jsonl(tmp_path / "pairs.jsonl", pairs(PAIRS))
    trainer = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    trainer |= {"train_sampling_strategy": "group_by_length"}
    train = {"model": "policy", "methods": {"dpo": {"loss": "dpo"}}, "trainer": trainer}
    whole = launched(
        processes, "train", run_file(tmp_path, "whole", processes, train=train),
        cwd=tmp_path, module="tests.helpers.recorded_cli",
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    steps = used(tmp_path, processes)
    assert_whole_epochs(steps[:10], PAIRS)
    file = run_file(tmp_path, "dies", processes, train=train)
    done = launched(processes, "train", file, cwd=tmp_path, module="tests.helpers.dying_cli", timeout=300)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    lost, stopped = "error [process-lost] process ", "terminated; what is finished is kept"
    assert lost in done.stderr or stopped in done.stderr, done.stderr
    assert not (tmp_path / "runs" / "dies" / "train-dpo").exists()
    again = launched(processes, "train", file, cwd=tmp_path, module="tests.helpers.recorded_cli")
    assert again.returncode == 0, again.stderr
    rest = used(tmp_path, processes)
    assert 12 - DIES_IN < len(rest) < 12 and rest == steps[-len(rest) :]
    assert_same_weights(*(tmp_path / "runs" / name / "train-dpo" / "model" for name in ("whole", "dies")), tolerance=0)


def test_verbs_of_one_process_run_once(tmp_path: Path) -> None:
    """A verb that does not share its work leaves the other processes idle."""
    jsonl(tmp_path / "pairs.jsonl", pairs(5))
    done = launched(2, "data", "check", "pairs.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("valid pairs") == 1


def test_what_would_lose_pairs_is_refused(tmp_path: Path) -> None:
    causal(tmp_path / "policy")
    jsonl(tmp_path / "pairs.jsonl", pairs(6))
    trainer = {"accelerator_config": {"even_batches": False}, "max_steps": 2}
    train = {"model": "policy", "methods": {"dpo": {"loss": "dpo"}}, "trainer": trainer}
    done = launched(2, "train", run_file(tmp_path, "uneven", 2, train=train), cwd=tmp_path)
    assert done.returncode != 0
    assert "error [trainer-key] accelerator_config.even_batches: found false" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("peft", [None, {"r": 4, "target_modules": ["q_proj", "v_proj"]}])
def test_sharded_training(tmp_path: Path, peft: dict[str, Any] | None) -> None:
    """configs/accelerate/fsdp2.yaml over two processes gives the weights of one process, of a model and an adapter."""
    causal(tmp_path / "policy")
    jsonl(tmp_path / "pairs.jsonl", pairs(PAIRS))
    methods = {"madpo": {"loss": "madpo"}, "beta": {"loss": "beta_dpo"}}
    for name, processes in (("one", 1), ("sharded", 2)):
        trainer = {"max_steps": 7, "learning_rate": 1e-3, "use_cpu": processes == 1}
        train = {"model": "policy", "methods": methods, "trainer": trainer, "peft": peft, "max_tokens_per_device": 25}
        file = run_file(tmp_path, name, processes, train=train)
        module = "align.cli" if processes == 1 else "tests.helpers.fsdp_cli"
        done = launched(
            processes,
            "train",
            file,
            cwd=tmp_path,
            module=module,
            launcher=ROOT / "configs" / "accelerate" / "fsdp2.yaml",
        )
        assert done.returncode == 0, done.stderr
    for rank in range(2):
        sharded, trained = json.loads((tmp_path / f"sharded-{rank}.json").read_text())
        assert 0 < sharded == trained
    kind = "model" if peft is None else "adapter_model"
    for method in methods:
        one, other = (tmp_path / "runs" / name / f"train-{method}" / "model" for name in ("one", "sharded"))
        assert_same_weights(one, other, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("peft", [None, {"r": 4, "target_modules": ["q_proj", "v_proj"]}])
def test_sharded_reward_model(tmp_path: Path, peft: dict[str, Any] | None) -> None:
    """The same for a reward model with an adapter merged into it."""
    llama_reward(tmp_path / "reward")
    jsonl(tmp_path / "pairs.jsonl", pairs(PAIRS))
    for name, processes in (("one", 1), ("sharded", 2)):
        trainer = {"max_steps": 7, "learning_rate": 1e-3, "use_cpu": processes == 1}
        reward = {"model": "reward", "max_length": 64, "trainer": trainer, "peft": peft}
        done = launched(
            processes,
            "reward",
            "train",
            run_file(tmp_path, name, processes, reward=reward),
            cwd=tmp_path,
            module="align.cli" if processes == 1 else "tests.helpers.fsdp_cli",
            launcher=ROOT / "configs" / "accelerate" / "fsdp2.yaml",
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    assert_same_weights(*(tmp_path / "runs" / name / "reward" / "model" for name in ("one", "sharded")))
