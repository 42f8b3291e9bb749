"""A run that is stopped while it samples goes on with the prompts that are left and ends as one that was not."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from align import evaluation_stages, stages
from align.config import RunConfig
from align.generation.transformers_engine import TransformersEngine
from align.pairs import read_pairs
from tests.builders import bert_reward, causal

PROMPTS = [f"the {a} {b} is" for a in ("good", "bad", "dull") for b in ("film", "plot", "review")]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    causal(tmp_path / "policy")
    bert_reward(tmp_path / "runs" / "r" / "reward" / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    prompts = str(tmp_path / "prompts.jsonl")
    policy = str(tmp_path / "policy")
    tree = {
        "name": "r", "output_dir": str(tmp_path / "runs"),
        "reward": {"model": policy, "pairs": {"path": "pairs.jsonl"}},
        "sample": {"prompts": prompts, "num_generations": 3, "max_new_tokens": 6},
        "train": {"model": policy, "methods": {"dpo": {"loss": "dpo"}}},
        "evaluate": {"prompts": prompts, "max_new_tokens": 6},
    }  # fmt: skip
    return RunConfig.model_validate(tree)


def stopped(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Prompts that are sampled from now on; the call after ``after`` of them is a Ctrl-C."""
    seen: list[str] = []
    generate = TransformersEngine.generate

    def counted(self: TransformersEngine, prompts: Any, *more: Any) -> Any:
        if len(seen) >= after:
            raise KeyboardInterrupt
        seen.extend(prompts)
        return generate(self, prompts, *more)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    return seen


@pytest.mark.parametrize("stage", ["sample", "generate"])
def test_a_stopped_stage_repeats_no_finished_part(
    stage: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, which = (stages, "") if stage == "sample" else (evaluation_stages, "reference")
    work = stages.WORK[stage]
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    whole.mkdir()
    halted.mkdir()
    work(config, config.folder, whole, which)
    monkeypatch.setattr(module, "PART", 4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        first = stopped(patch, 8)
        work(config, config.folder, halted, which)
    assert first == PROMPTS[:8]
    rest = stopped(monkeypatch, 99)
    work(config, config.folder, halted, which)
    assert rest == PROMPTS[8:] and not (halted / "parts").exists()
    if stage == "sample":
        assert read_pairs(halted / "train").to_list() == read_pairs(whole / "train").to_list()
        return
    tables = [pq.read_table(folder / "completions.parquet").to_pydict() for folder in (whole, halted)]
    for name in ("prompt", "text", "tokens"):
        assert tables[0][name] == tables[1][name]
    assert tables[0]["logp_policy"] == pytest.approx(tables[1]["logp_policy"], abs=1e-5)
