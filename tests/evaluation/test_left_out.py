"""A prompt that one policy cannot complete is left out for all: the numbers are those of the other prompts alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from align.api import compare_policies
from align.commands.compare import write_comparisons
from align.commands.evaluate import frontier, reward
from align.commands.evaluation_job import Settings
from align.config import RunConfig
from align.errors import DataError
from align.evaluation.left_out import completed_by_all
from align.generation.types import Sampling
from align.io.files import read_json
from align.run.stages import work_of
from tests.helpers.builders import causal, llama_reward

FITTING = [f"the {word} film is" for word in ("good", "bad", "dull", "fine", "nice")]
LONG = "the film is " + "very " * 20
PROMPTS = [*FITTING[:2], LONG, *FITTING[2:]]


def with_window(folder: Path, seed: int, window: int) -> Path:
    """A random policy that reads ``window`` tokens."""
    causal(folder, seed)
    config = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = window
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A policy that takes all prompts, one whose window the long prompt fills, and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    return with_window(folder / "wide", 0, 128), with_window(folder / "narrow", 1, 16), llama_reward(folder / "rm")


def table(folder: Path, prompts: list[str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(folder / "prompts.jsonl")


def without_run(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "run"}


def test_verbs_leave_it_out_for_every_policy_and_say_so(
    models: tuple[Path, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide, narrow, judge = map(str, models)
    reports = {}
    for name, prompts in (("all", PROMPTS), ("fitting", FITTING)):
        out = tmp_path / name
        settings = Settings(table(out / "in", prompts), out / "out", judge, Sampling(4, batch_size=8), None, 9)
        reward([f"narrow={narrow}"], wide, settings)
        write_comparisons([f"wide={wide}", f"narrow={narrow}"], settings)
        frontier([f"narrow={narrow}"], wide, [1.0, 0.5], [], settings)
        reports[name] = read_json(out / "out" / "report.json")
    found, expected = reports["all"], reports["fitting"]
    (key,) = found["comparisons"]
    for ours, theirs in (
        (found["reward"], expected["reward"]),
        (found["comparisons"][key], expected["comparisons"][key]),
        (found["frontier"], expected["frontier"]),
    ):
        assert without_run(ours) == without_run(theirs)
        assert ours["run"]["n_prompts"] == 5 and "left_out" not in theirs["run"]
        gone = ours["run"]["left_out"]
        assert (gone["count"], gone["of"], gone["by_policy"]) == (1, 6, {"narrow": gone["by_policy"]["narrow"]})
        assert gone["by_policy"]["narrow"] == 1 and gone["prompts"][0].startswith("2: the film is very")
    assert "1 of 6 prompts are left out for every policy, since some could not complete them (narrow 1)" in caplog.text
    page = (tmp_path / "all" / "out" / "report.html").read_text()
    assert "1 of 6 prompts that not every policy could complete (narrow: 1)" in page
    assert "not every policy" not in (tmp_path / "fitting" / "out" / "report.html").read_text()


def test_none_left_is_refused(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    wide, narrow, judge = map(str, models)
    settings = Settings(table(tmp_path / "in", [LONG]), tmp_path / "out", judge, Sampling(4), None, 9)
    with pytest.raises(DataError, match=r"none of 1 prompts was completed by every policy \(not completed: narrow 1\)"):
        reward([f"narrow={narrow}"], wide, settings)
    with pytest.raises(DataError, match="none of 2 prompts was completed by every policy"):
        completed_by_all(["a", "b"], {"x": [True, False], "y": [False, True]})


def test_python_compares_the_same_prompts(models: tuple[Path, Path, Path]) -> None:
    wide, narrow, judge = map(str, models)
    more: dict[str, Any] = {"judge": judge, "max_new_tokens": 4, "n": 2}
    found, expected = (compare_policies(wide, narrow, prompts, **more) for prompts in (PROMPTS, FITTING))
    assert found.table.to_dict() == expected.table.to_dict() and found.win_rate == expected.win_rate
    assert found.details["run"]["n_prompts"] == 5
    assert found.details["run"]["left_out"]["count"] == 2  # of 12 completions


def test_stages_of_a_run_leave_it_out(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The base takes the long prompt and a policy does not: both are judged on the others."""
    wide, narrow, _ = models
    results = []
    for name, prompts in (("all", PROMPTS), ("fitting", FITTING)):
        tree = {
            "name": name, "output_dir": str(tmp_path), "pairs": {"path": "unread"},
            "train": {"model": str(wide), "methods": {"dpo": {"loss": "dpo"}}},
            "evaluate": {"prompts": table(tmp_path / name / "in", prompts), "max_new_tokens": 4, "judge": "vader"},
        }  # fmt: skip
        config = RunConfig.model_validate(tree)
        trained = config.folder / "train-dpo" / "model"
        trained.parent.mkdir(parents=True)
        trained.symlink_to(narrow)
        for stage in ("generate-reference", "generate-dpo"):
            (config.folder / stage).mkdir()
            work_of(stage)(config, config.folder / stage)
        results.append(config)
    found, expected = map(evaluated, results)
    assert found.pop("left_out") == {
        "count": 1, "of": 6, "by_policy": {"dpo": 1}, "prompts": ["2: " + " ".join(LONG.split())[:80]]
    }  # fmt: skip
    assert found == expected and found["n_prompts"] == 5


def evaluated(config: RunConfig) -> dict[str, Any]:
    from align.data.pairs import table_of, write_pairs

    rows = [{"id": "0", "prompt": "good", "chosen": " film", "rejected": " plot"}]
    write_pairs(table_of(rows, ["id", "prompt", "chosen", "rejected"], "pairs"), config.folder / "margins" / "pairs")
    (config.folder / "evaluate").mkdir()
    work_of("evaluate")(config, config.folder / "evaluate")
    found: dict[str, Any] = read_json(config.folder / "evaluate" / "metrics.json")
    return found
