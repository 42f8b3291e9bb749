"""Configuration: every mistake is named with its path and the nearest valid key, before anything heavy loads."""

import ast
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from align.config import load_config
from align.errors import ConfigError
from align.run.iterate import load_iterate
from tests.helpers.bad_input_makers import run_command

GOOD = """
name: tiny
pairs: {path: pairs.jsonl}
reward: {model: backbone}
train:
  model: policy
  methods:
    madpo: {loss: madpo}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


BROKEN = [
    (GOOD + "rewards: {}\n", "rewards: unknown key (did you mean `reward`?)"),
    (GOOD.replace("{loss: madpo}", "{los: madpo}"), "train.methods.madpo.los: unknown key (did you mean `loss`?)"),
    (GOOD.replace("{loss: madpo}", "{los: madpo}"), "train.methods.madpo.loss: missing key"),
    (GOOD + "seed: many\n", "seed: expected a valid integer"),
    (GOOD.replace("model: policy", "modell: policy"), "train.model: missing key"),
    (GOOD.replace("{model: backbone}", "{model: backbone, folds: 1}"), "reward: folds must be 0"),
    (
        GOOD.replace("{model: backbone}", "{model: backbone, eval_fraction: 1.5}"),
        "reward.eval_fraction: expected less than 1",
    ),
    (GOOD + "sample: {prompts: p.jsonl}\n", "give exactly one of `pairs`"),
    (GOOD.replace("    madpo: {loss: madpo}\n", "    {}\n"), "train.methods: expected at least 1 entry, found {}"),
    ("name: [unclosed", "not valid YAML"),
    ("- a list\n", "expected a mapping of keys to values, found list"),
    ("name: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "said"), BROKEN)
def test_a_mistake_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and said in str(caught.value)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, GOOD + "seed: many\nnam: x\n"))
    assert "seed" in str(caught.value) and "nam: unknown key (did you mean `name`?)" in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read \(No such file"):
        load_config(Path("nowhere.yaml"))


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    config = load_config(path, ["train.methods.madpo.parameters.beta=0.3", "seed=7", "train.peft.r=4"])
    assert config.train is not None and config.train.methods["madpo"].parameters == {"beta": 0.3}
    assert config.seed == 7 and config.train.peft == {"r": 4}
    for override, said in (
        ("seed", "expected key.path=value"),
        ("name.x=1", "name is a value"),
        ("a=[", "not a YAML value"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(path, [override])


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_recipe_is_valid(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    loaded = load_iterate(path, None) if "rounds" in tree else load_config(path)
    assert loaded.name == tree["name"]


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
@pytest.mark.parametrize(
    "command",
    [
        "eval reward a --prompts x", "eval compare a b --prompts x", "eval frontier a --prompts x", "filter run a",
        "eval reward-model a --model x", "generate a --model x", "best-of-n a", "trust a --model x",
        "advise a --model x",
    ],
)  # fmt: skip
def test_a_seed_that_some_library_refuses_is_refused_before_any_work(command: str, seed: str, tmp_path: Path) -> None:
    """Nothing that is named is there, and nothing of it is looked at first."""
    code, _, errors = run_command((*command.split(), "--output", "o", "--seed", seed), tmp_path)
    assert code == 2 and "Invalid value for '--seed':" in errors and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_of_rounds_is_as_that_of_a_run(seed: int) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "iterative.yaml"
    with pytest.raises(ConfigError, match="seed: expected"):
        load_iterate(recipe, [f"seed={seed}"])
    assert load_iterate(recipe, [f"seed={2**32 - 1}"]).seed == 2**32 - 1


def test_every_field_says_what_it_is() -> None:
    """Every field of a section has a docstring under it, which gives its unit."""
    silent = []
    for file in (Path(__file__).parents[2] / "align" / "config").glob("*.py"):
        for section in ast.walk(ast.parse(file.read_text())):
            if isinstance(section, ast.ClassDef) and any(ast.unparse(base) == "Section" for base in section.bases):
                silent += [
                    f"{file.name}: {section.name}.{ast.unparse(field.target)}"
                    for field, below in pairwise([*section.body, None])
                    if isinstance(field, ast.AnnAssign)
                    and not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant))
                ]
    assert silent == []


def test_help_is_quick_and_light() -> None:
    """Importing the command line loads neither torch nor transformers; help answers within half a second here."""
    code = "import sys, align.cli.main, align.config; "
    code += "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    times = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "align.cli", "--help"], check=True, capture_output=True)
        after = os.times()  # processor time: other tests run at the same time
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert 0 < min(times) < 0.5
