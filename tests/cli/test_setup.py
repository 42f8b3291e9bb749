"""Verbs for the time before a run: explain, recipes, schema, doctor."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from typer.testing import CliRunner

from align.cli.main import ORDER, app
from align.commands import doctor, self_test
from align.commands.explain import error_codes, explain
from align.commands.recipes import recipe, recipes
from align.commands.schema import schema
from align.config import RunConfig
from align.config.iterate import IterateConfig
from align.config.reading import section_from
from align.config.schema import field_texts, sections_of
from align.errors import ConfigError, EnvironmentProblem
from align.io import shipped as places

RUN = {"name": "x", "pairs": {"path": "p"}, "train": {"model": "m", "methods": {"dpo": {"loss": "dpo"}}}}


def test_explain_finds_codes_that_share_a_row_and_names_the_nearest() -> None:
    codes = error_codes()
    assert codes["config-yaml"] == codes["config-file"]
    assert explain(" [layout] ") == {"code": "layout"} | codes["layout"]
    assert all(entry["cause"] and entry["fix"] for entry in codes.values())
    with pytest.raises(ConfigError, match="did you mean `layout`"):
        explain("layuot")


def test_recipes_say_what_they_are_for_and_fit_their_schema() -> None:
    found = {kind: schema(kind) for kind in ("run", "iterate")}
    assert {"demo", "helpfulness", "iterative"} <= set(recipes())
    for name, purpose in recipes().items():
        tree = yaml.safe_load(recipe(name))
        kind, section = ("iterate", IterateConfig) if "rounds" in tree else ("run", RunConfig)
        jsonschema.validate(tree, found[kind])
        section_from(tree, section, name)
        assert len(purpose) > 20
    with pytest.raises(ConfigError, match="did you mean `demo`"):
        recipe("demos")
    with pytest.raises(ConfigError):
        recipe("../pyproject")


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "sed", 1), (("train",), "modle", "m"), (("train",), "trainer", {"lr": 1e-5}), (("train",), "layout", "x"),
        (("train",), "trainer", {"learning_rate": "fast"}), (("train",), "peft", {"rank": 4}), ((), "seed", -1),
        (("train", "methods", "dpo"), "loss", "ddpo"), (("train",), "max_tokens_per_device", 0),
    ],
)  # fmt: skip
def test_schema_refuses_what_a_run_refuses(place: tuple[str, ...], key: str, value: Any) -> None:
    found = schema("run")
    jsonschema.validate(RUN, found)
    tree = json.loads(json.dumps(RUN))
    node = tree
    for part in place:
        node = node[part]
    node[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, found)


def test_schema_describes_every_key() -> None:
    for kind in (RunConfig, IterateConfig):
        for section in sections_of(kind):
            texts = field_texts(section)
            assert [name for name in section.model_fields if not texts.get(name)] == []
    text = schema("run")["$defs"]["PairsSection"]["properties"]["split"]["description"]
    assert text.startswith("Split of a hub dataset, saved dataset dictionary")


def test_doctor_passes_here_and_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SecretSecretSecretSecretSecret")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hidden@proxy.example:3128")
    shown = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(shown.stdout)
    assert shown.exit_code == 0 and found["problems"] == []
    assert "hf_" not in shown.stdout and "hidden" not in shown.stdout
    assert found["settings"]["HTTPS_PROXY"] == "http://***@proxy.example:3128"
    assert found["packages"]["torch"]["installed"] == importlib.metadata.version("torch")
    assert len(found["checks"]) == 8
    text = doctor.as_text(found)
    assert "FAIL" not in text and "torch" in text and "one DPO step equals trl's" in text


def test_self_test_finds_a_wrong_number_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    true = self_test.pair_logps

    def wrong(model: Any, batch: Any, layout: Any) -> Any:
        found = true(model, batch, layout)
        return found._replace(chosen=found.chosen + 0.01) if layout == "shared_prefix" else found

    monkeypatch.setattr(self_test, "pair_logps", wrong)
    monkeypatch.setattr(self_test, "GradientProducts", None)
    layouts, step, products, completions = self_test.self_test("cpu", "float32")
    assert not layouts["ok"] and step["ok"] and completions["ok"]
    assert not products["ok"] and products["found"].startswith("TypeError")


def test_self_test_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    next(self_test.self_test("cpu", "float32"))
    assert torch.rand(2).equal(expected)


def test_a_package_out_of_range_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    true = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"trl": "9.0", "peft": None}.get(name, true(name)))
    shown = CliRunner().invoke(app, ["doctor", "--no-self-test"])
    assert isinstance(shown.exception, EnvironmentProblem) and "required packages" in str(shown.exception)
    assert "trl 9.0, wanted <1.17,>=1.16" in shown.stdout and "peft missing" in shown.stdout


def test_files_that_did_not_come_along_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(places, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(EnvironmentProblem, match=r"docs/errors\.md: found in none of"):
        places.shipped("docs/errors.md")


def test_every_verb_has_its_place() -> None:
    names = {one.name or one.callback.__name__ for one in app.registered_commands if one.callback}
    names |= {one.name for one in app.registered_groups}
    assert names == set(ORDER)


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"align {importlib.metadata.version('margin-align')}\n"
