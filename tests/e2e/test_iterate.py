"""`align iterate`: each round starts from the policy of the one before, and a finished stage is not run again."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from align.data.pairs import read_pairs
from align.run.iterate import load_iterate
from tests.helpers.bad_input_makers import run_command
from tests.helpers.builders import bert_reward, causal
from tests.helpers.command_line import align, jsonl


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    causal(tmp_path / "policy")
    bert_reward(tmp_path / "reward")
    words = ("good", "bad", "dull", "fine", "great")
    prompts = [{"prompt": f"the {a} {b} is"} for a in words for b in words]
    jsonl(tmp_path / "prompts.jsonl", prompts)
    jsonl(tmp_path / "second.jsonl", prompts[1::2])
    small = {"max_steps": 3, "per_device_train_batch_size": 4, "bf16": False, "gradient_checkpointing": False}
    run: dict[str, Any] = {
        "name": "it", "rounds": 2, "prompts": {"path": "prompts.jsonl"},
        "generate": {"n": 3, "max_new_tokens": 6, "engine": "transformers"},
        "pairs": {"reward_model": "reward"},
        "train": {"model": "policy", "methods": {"dpo": {"loss": "dpo"}}, "trainer": small | {"learning_rate": 1e-2},
                  "peft": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
    }  # fmt: skip
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def ran(stderr: str) -> list[str]:
    """The steps of the rounds that ran, without the measurement of the KL."""
    names = [line.split(":")[0] for line in stderr.splitlines() if line.endswith(": running")]
    return [name for name in names if not name.endswith(" of policy")]


def test_rounds(workspace: Path) -> None:
    first = align("iterate", "it.yaml", cwd=workspace)
    assert first.returncode == 0, first.stderr
    root = workspace / "runs" / "it"
    assert ran(first.stderr) == ["generate", "pairs-build", "train"] * 2
    rounds = json.loads((root / "iterate.json").read_text())["rounds"]
    assert [entry["trained"] for entry in rounds] == [f"runs/it/round-{r}/train/policy" for r in (1, 2)]
    ids = [set(pq.read_table(root / f"round-{r}/generate/completions.parquet")["id"].to_pylist()) for r in (1, 2)]
    assert len(ids[0] | ids[1]) == 25 and not ids[0] & ids[1]
    assert len(read_pairs(root / "round-2" / "pairs")) > 0

    assert rounds[0]["kl_to_start"] is None and rounds[1]["kl_to_start"]["n"] == 12
    lora = align("eval", "reward", "one=runs/it/round-1/train/policy", "--reference", "policy", "--judge", "vader",
                 "--prompts", "second.jsonl", "--max-new-tokens", "6", "--output", "eval", cwd=workspace)  # fmt: skip
    assert lora.returncode == 0, lora.stderr
    expected = json.loads(lora.stdout)["policies"]["one"]["kl"]
    assert rounds[1]["kl_to_start"] == pytest.approx(expected) and expected["value"] > 0
    page = (root / "report.html").read_text()
    assert "runs/it/round-1/train/policy" in page and "2 rounds from policy" in page and "by reward" in page

    start = load_file(workspace / "policy" / "model.safetensors")
    weights = [load_file(root / f"round-{r}/train/policy/model.safetensors") for r in (1, 2)]
    name = next(name for name in start if "q_proj" in name)
    fixed = next(name for name in start if "o_proj" in name)
    assert not torch.equal(start[name], weights[0][name]) and not torch.equal(weights[0][name], weights[1][name])
    assert torch.equal(start[fixed], weights[1][fixed])
    adapter = json.loads((root / "round-2/train/model/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "runs/it/round-1/train/policy"

    again = align("iterate", "it.yaml", cwd=workspace)
    assert again.returncode == 0 and ran(again.stderr) == []
    more = align("iterate", "it.yaml", "--set", "train.methods.dpo.parameters.beta=0.3", cwd=workspace)
    assert more.returncode == 0, more.stderr
    again_ran = ran(more.stderr)  # pairs are built again only if the other policy wrote something else
    assert again_ran[:2] == ["train", "generate"] and again_ran[-1] == "train" and len(again_ran) in (3, 4)


def test_mistakes_cost_one_line(workspace: Path) -> None:
    cases = [
        ("rouns=2", "rouns: unknown key (did you mean `rounds`?)"),
        ("generate.engine=server", "generate.engine: found server, which serves one model, and each round samples"),
        ("generate.engine=vlm", "generate.engine: expected 'auto', 'vllm' or 'transformers'"),
        ("generate.n=1", "generate.n: expected greater than or equal to 2"),
        ("pairs.judge=vader", "give either a reward model or a judge"),
        ("train.methods={}", "train.methods"),
        ("train.methods.madpo.loss=madpo", "found 2 methods, expected one"),
        ("train.methods.dpo.loss=dpoo", "did you mean `dpo`?"),
        ("train.trainer.lerning_rate=1", "train.trainer.lerning_rate: not a field of DPOConfig"),
        ("train.trust=auto", "train.trust: found auto, which rounds do not measure"),
        ("rounds=26", "found 25 prompts, expected one for each of 26 rounds"),
    ]
    for override, said in cases:
        code, _, errors = run_command(("iterate", "it.yaml", "--set", override), workspace)
        assert code == 2 and said in errors, errors
    assert not (workspace / "runs").exists()


def test_the_recipe_is_valid() -> None:
    config = load_iterate(Path(__file__).parents[2] / "configs" / "iterative.yaml", None)
    assert config.rounds == 3 and config.pairs.guard_margin == 0.2
