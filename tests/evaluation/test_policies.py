"""Names, references and checkpoints of the policies of an evaluation."""

import json
from pathlib import Path

import pytest

from align.errors import ConfigError
from align.evaluation.policies import Policy, checkpoints, find_reference, parse_policies


def test_names_of_policies() -> None:
    found = parse_policies(["a=x/y", "runs/demo/train-dpo/model", "runs/demo/train-madpo", "smollm2"])
    assert [(policy.name, policy.model) for policy in found] == [
        ("a", "x/y"), ("dpo", "runs/demo/train-dpo/model"), ("madpo", "runs/demo/train-madpo"), ("smollm2", "smollm2"),
    ]  # fmt: skip
    for wrong in (["a b=x"], ["=x"], ["a="], ["reference=x"], ["<i>=x"]):
        with pytest.raises(ConfigError, match="expected NAME=FOLDER"):
            parse_policies(wrong)
    with pytest.raises(ConfigError, match="'a' is there twice"):
        parse_policies(["a=x", "a=y"])


def test_the_reference_is_what_the_adapters_were_trained_on(tmp_path: Path) -> None:
    for name, base in (("one", "base"), ("two", "base"), ("three", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    one, two, three = (Policy(name, str(tmp_path / name)) for name in ("one", "two", "three"))
    assert find_reference([one, two], None) == Policy("reference", "base")
    assert find_reference([one, two], "given").model == "given"
    for unclear in ([one, three], [one, Policy("whole", str(tmp_path))]):
        with pytest.raises(ConfigError, match="--reference: needed"):
            find_reference(unclear, None)


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("checkpoint-100", "checkpoint-20", "model", "checkpoint-x"):
        (tmp_path / name).mkdir()
    found = checkpoints(Policy("a", str(tmp_path)))
    assert [(step, Path(policy.model).name) for step, policy in found] == [
        (20, "checkpoint-20"), (100, "checkpoint-100"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="holds no folder checkpoint-<step>"):
        checkpoints(Policy("a", str(tmp_path / "model")))
