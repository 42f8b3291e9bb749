"""Any run file and any override gives a configuration or an error that the user can fix, never a crash."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.config import RunConfig, apply_override, load_config
from align.errors import AlignError
from align.run import pipeline

SHORT, LONG = 200, 5000
FOLDER_IS_SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
texts = st.one_of(st.text(max_size=20), st.sampled_from(["", " ", "user", "nan", "1e999", "../x", "a/b"]))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.sampled_from([10**400, -(2**70)]))


def check_config(folder: Path, text: str | bytes) -> None:
    """A run file of this text."""
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        config = load_config(path)
    except AlignError as error:
        assert error.message.startswith(str(path)) and len(error.message) < 20_000
        return
    stages = pipeline.plan(config)
    assert stages and all((config.folder / stage).parent == config.folder for stage in stages)


KNOWN_KEYS = """
    name output_dir seed pairs sample reward train evaluate model methods loss parameters peft trainer layout path split
    columns limit prompts judge max_new_tokens temperature folds eval_fraction dpo madpo beta tau
"""
keys = st.one_of(st.sampled_from(KNOWN_KEYS.split()), texts)
trees = st.recursive(
    st.one_of(scalars, st.sampled_from(["dpo", "pairs.jsonl", "vader", "auto"]), st.dates(), st.binary(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=6)),
    max_leaves=20,
)
noise = st.text(alphabet="ab: -[]{}&*!|>#%@`'\"\n\t,?~<.0é", max_size=80)
WHOLE: dict[str, Any] = {
    "name": "x", "seed": 1, "pairs": {"path": "p.jsonl", "columns": {}, "limit": 3},
    "reward": {"model": "b", "folds": 2, "eval_fraction": 0.1, "trainer": {}},
    "train": {"model": "p", "methods": {"a": {"loss": "madpo", "parameters": {"beta": 0.1}}}, "peft": {"r": 4}},
    "evaluate": {"prompts": "q.jsonl", "temperature": 1.0, "judge": "vader"},
}  # fmt: skip
PATHS = """
    name seed output_dir sample pairs pairs.limit pairs.columns reward.folds reward.trainer train.methods
    train.methods.a train.methods.a.parameters.beta train.peft evaluate.temperature evaluate.judge
"""
paths = st.sampled_from(PATHS.split())


def dumped(tree: Any) -> str:
    """YAML of any value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return yaml.safe_dump(tree, allow_unicode=True)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The run file ``WHOLE`` with another value at ``path``."""
    tree = json.loads(json.dumps(WHOLE))
    *parents, last = path.split(".")
    node = tree
    for part in parents:
        node = node[part]
    node[last] = value
    return tree  # type: ignore[no-any-return]


@settings(max_examples=SHORT, suppress_health_check=FOLDER_IS_SHARED)
@given(st.one_of(trees.map(dumped), noise, st.binary(max_size=60)))
def test_any_run_file(tmp_path: Path, text: str | bytes) -> None:
    check_config(tmp_path, text)


@settings(max_examples=SHORT, suppress_health_check=FOLDER_IS_SHARED)
@given(paths, trees)
def test_one_wrong_value_in_a_whole_run_file(tmp_path: Path, path: str, value: Any) -> None:
    check_config(tmp_path, dumped(changed(path, value)))


@settings(max_examples=SHORT)
@given(st.one_of(noise, st.tuples(paths, noise).map("=".join)))
def test_any_override(override: str) -> None:
    tree = json.loads(json.dumps(WHOLE))
    try:
        apply_override(tree, override)
    except AlignError as error:
        assert error.message.startswith("--set ")


def test_the_whole_run_file_of_these_tests_is_right(tmp_path: Path) -> None:
    check_config(tmp_path, dumped(WHOLE))
    assert RunConfig.model_validate(WHOLE).name == "x"


@pytest.mark.slow
@settings(max_examples=LONG, suppress_health_check=FOLDER_IS_SHARED)
@given(st.one_of(trees.map(dumped), noise, st.binary(max_size=200)), paths, trees)
def test_all_of_it_for_longer(tmp_path: Path, text: str | bytes, path: str, value: Any) -> None:
    check_config(tmp_path, text)
    check_config(tmp_path, dumped(changed(path, value)))
