"""The figures of a report in the cards and the tracked runs of what the run trained."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from align.config import EvaluateSection, LossSection, PairsSection, RewardSection, RunConfig, TrainSection
from align.io.files import write_json
from align.models.model_card import NO_RESULTS, RESULTS
from align.run.figures import publish_figures


def estimate(value: float, half: float) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 40}


def test_figures_of_a_report_reach_card_and_tracker(tmp_path: Path) -> None:
    fields = {"report_to": "tensorboard"}
    config = RunConfig(
        name="run", output_dir=str(tmp_path), pairs=PairsSection(path="pairs.jsonl"),
        reward=RewardSection(model="m", trainer=fields),
        train=TrainSection(model="m", methods={name: LossSection(loss="dpo") for name in "ab"}, trainer=fields),
        evaluate=EvaluateSection(prompts="prompts.jsonl", judge="vader"),
    )  # fmt: skip
    for folder in ("train-a/model", "train-b/model", "reward/model"):
        (config.folder / folder).mkdir(parents=True)
        (config.folder / folder / "README.md").write_text(f"{RESULTS[0]}\n{NO_RESULTS}\n{RESULTS[1]}\n")
    for name in ("run-a", "run-reward"):
        (config.folder / "tracking" / name).mkdir(parents=True)
        write_json(config.folder / "tracking" / name / "tracking.json", {"ids": {"tensorboard": name}, "step": 7})
    none = dict.fromkeys(("gain_per_root_kl", "reward_model_gain"))
    policies = {
        name: {"reward": estimate(0.5 + k, 0.1), "gain": estimate(0.25, 0.125), "kl": estimate(2.0, 1.0)} | none
        for k, name in enumerate("ab")
    }
    report = {
        "training": {"methods": {"a": {}, "b": {}}},
        "evaluation": {"policies": policies, "judge": "vader", "n_prompts": 40},
        "reward_model": {"heldout": {"accuracy": estimate(0.75, 0.0625)}},
    }
    publish_figures(config, report)
    cards = {
        name: (config.folder / name / "model" / "README.md").read_text() for name in ("train-a", "train-b", "reward")
    }
    assert "| reward by the judge | 0.50 (0.40 to 0.60) |" in cards["train-a"]
    assert "| reward by the judge | 1.50 (1.40 to 1.60) |" in cards["train-b"]
    assert "95% intervals over 40 held-out prompts; judge: vader." in cards["train-a"]
    assert "| accuracy on held-out pairs | 0.750 (0.688 to 0.812) |" in cards["reward"]
    assert NO_RESULTS not in "".join(cards.values())
    found = EventAccumulator(str(config.folder / "tracking" / "run-a"))
    found.Reload()
    logged = {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert logged["final/kl"] == [(7, 2.0)] and logged["final/gain_low"] == [(7, 0.125)]
    assert not any("root_kl" in name for name in logged)
    assert not (config.folder / "tracking" / "run-b").exists()
