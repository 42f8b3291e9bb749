"""`align init`: a run file that runs as it is, for the layouts of public preference data."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from align.cli.main import app
from align.commands.init import run_file, write_run_file
from align.commands.recipes import recipe
from align.commands.schema import schema
from align.config import load_config
from align.data.layouts import guess_columns
from align.errors import AlignError, ConfigError, DataError
from align.run.checks import check_config
from align.run.pipeline import run_pipeline
from tests.helpers.builders import trained_adapter

QUESTION, GOOD, BAD = "the film {} was", "very good", "bad"
HUMAN = f"Human: {QUESTION} Assistant: "


def row(k: int, **names: Any) -> dict[str, Any]:
    return {column: value.format(k) if isinstance(value, str) else value for column, value in names.items()}


def chat(k: int, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTION.format(k)}, {"role": "assistant", "content": answer}]


def table(folder: Path, rows: list[dict[str, Any]], name: str = "pairs") -> Path:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


LAYOUTS = {
    "trl": [row(k, prompt=QUESTION, chosen=GOOD, rejected=BAD) for k in range(24)],
    "orca": [row(k, system="the review", question=QUESTION, chosen=GOOD, rejected=BAD) for k in range(24)],
    "conversations": [{"chosen": chat(k, GOOD), "rejected": chat(k, BAD), "score_chosen": 9.0} for k in range(24)],
    "messages": [
        {"prompt": chat(k, "")[:1], "chosen": chat(k, GOOD)[1:], "rejected": chat(k, BAD)[1:]} for k in range(24)
    ],
    "hh": [row(k, chosen=HUMAN + GOOD, rejected=HUMAN + BAD) for k in range(24)],
    "argilla": [row(k, instruction=QUESTION, chosen_response=GOOD, rejected_response=BAD) for k in range(24)],
    "winners": [row(k, Context=QUESTION, Winner=GOOD, Loser=BAD) for k in range(24)],
    "margins": [row(k, prompt=QUESTION, chosen=GOOD, rejected=BAD, margin=0.5) for k in range(24)],
    "bad rows": [row(k, prompt=QUESTION, chosen=GOOD, rejected=BAD if k else GOOD) for k in range(24)],
    "ids": [row(k, id="row {}", question=QUESTION, preferred=GOOD, dispreferred=BAD, source="a") for k in range(24)],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_file_for_public_layouts(layout: str, tiny_policy: Path, tmp_path: Path) -> None:
    file = table(tmp_path, LAYOUTS[layout])
    text = run_file(str(file), str(tiny_policy))
    (tmp_path / "run.yaml").write_text(text)
    jsonschema.validate(yaml.safe_load(text), schema("run"))
    config = load_config(tmp_path / "run.yaml")
    check_config(config, tables=True)
    assert config.train is not None and config.pairs is not None
    assert ("madpo" in config.train.methods) == (layout == "margins")
    assert config.pairs.drop_invalid == (layout == "bad rows")
    assert ("column 'system' is not used" in text) == (layout == "orca")
    assert text == run_file(str(file), str(tiny_policy))


def test_the_file_trains_as_it_is(tiny_policy: Path, tmp_path: Path) -> None:
    text = run_file(str(table(tmp_path, LAYOUTS["orca"])), str(tiny_policy))
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(tmp_path / "run.yaml", [f"output_dir={tmp_path / 'runs'}"])
    assert run_pipeline(config, command="align run").exists()
    assert list(config.folder.glob("train-dpo/model/adapter_model.safetensors"))


def test_length_holds_99_of_100_pairs_and_not_more_than_the_window(tiny_policy: Path, tmp_path: Path) -> None:
    rows = [
        row(k, prompt=QUESTION, chosen=" ".join(["good"] * (90 if k < 10 else 5)), rejected=BAD) for k in range(100)
    ]
    short = yaml.safe_load(run_file(str(table(tmp_path, rows[10:])), str(tiny_policy)))
    long = yaml.safe_load(run_file(str(table(tmp_path, rows)), str(tiny_policy)))
    assert short["train"]["trainer"]["max_length"] == 64 and long["train"]["trainer"]["max_length"] == 128
    rows[0]["chosen"] = " ".join(["good"] * 500)
    text = run_file(str(table(tmp_path, rows[:10])), str(tiny_policy))
    assert yaml.safe_load(text)["train"]["trainer"]["max_length"] == 128  # the tiny model's window
    assert "10.0% are longer" in text


def test_goals(tiny_policy: Path, tmp_path: Path) -> None:
    rows = [row(k, prompt=QUESTION + " a" * (k % 7), chosen=GOOD, rejected=BAD) for k in range(240)]
    file = str(table(tmp_path, rows))
    found = {
        goal: yaml.safe_load(run_file(file, str(tiny_policy), goal=goal))
        for goal in ("quality", "speed", "small-memory")
    }
    assert found["quality"]["reward"]["folds"] == 5 and set(found["quality"]["train"]["methods"]) == {"dpo", "madpo"}
    assert "reward" not in found["speed"] and found["small-memory"]["train"]["peft"]["r"] == 8
    assert found["speed"]["train"]["eval_pairs"] == {"share": 0.1}
    assert found["speed"]["train"]["trainer"]["per_device_train_batch_size"] == 8  # 240 // 20, a power of two
    with pytest.raises(ConfigError, match="did you mean `speed`"):
        run_file(file, str(tiny_policy), goal="sped")


def test_an_adapter_is_trained_further(tiny_policy: Path, tmp_path: Path) -> None:
    adapter = trained_adapter(tiny_policy, tmp_path / "adapter", 0)
    text = run_file(str(table(tmp_path, LAYOUTS["trl"])), str(adapter))
    assert "peft" not in yaml.safe_load(text)["train"] and "is an adapter" in text


@pytest.mark.parametrize("name", ["a: b # c", "quote'\"s", "{x}", "- list", "ünïcode", "two\nlines: {a: 1}"])
def test_names_of_files_are_quoted(name: str, tiny_policy: Path, tmp_path: Path) -> None:
    file = table(tmp_path, LAYOUTS["trl"], name=name)
    assert yaml.safe_load(run_file(str(file), str(tiny_policy)))["pairs"]["path"] == str(file)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ({"prompt", "completions"}, "scored completions"), ({"conversation_a", "conversation_b", "winner"}, "battles"),
        ({"prompt", "response_0", "response_1"}, "number of the better"), ({"prompt", "completion", "label"}, "thumbs"),
        ({"text", "chosen"}, "no two columns"),
    ],
)  # fmt: skip
def test_tables_that_hold_no_pairs_are_named(names: set[str], problem: str, tiny_policy: Path, tmp_path: Path) -> None:
    assert problem in guess_columns(names).problem
    file = table(tmp_path, [dict.fromkeys(names, "x")])
    with pytest.raises(DataError, match=f"(?s){problem}.*columns: .*align pairs from"):
        run_file(str(file), str(tiny_policy))


def test_a_named_column_overrides_the_guess(tiny_policy: Path, tmp_path: Path) -> None:
    file = table(tmp_path, [row(k, prompt=QUESTION, chosen=GOOD, rejected=BAD, other="great") for k in range(24)])
    text = run_file(str(file), str(tiny_policy), columns={"rejected": "other"})
    assert yaml.safe_load(text)["pairs"]["columns"] == {"rejected": "other"}
    with pytest.raises(DataError, match=r"'othr'.*did you mean `other`"):
        run_file(str(file), str(tiny_policy), columns={"rejected": "othr"})


def test_the_command_keeps_a_file_that_is_there(tiny_policy: Path, tmp_path: Path) -> None:
    file, output = table(tmp_path, LAYOUTS["trl"]), tmp_path / "run.yaml"
    command = ["init", str(file), "--model", str(tiny_policy), "--output", str(output)]
    assert CliRunner().invoke(app, command).exit_code == 0
    before = output.read_text()
    write_run_file(before, output)
    assert CliRunner().invoke(app, [*command, "--goal", "small-memory"]).exit_code == 1
    assert output.read_text() == before
    assert CliRunner().invoke(app, ["init", "--demo"]).stdout == recipe("demo")


@pytest.mark.parametrize("arguments", [[], ["pairs.jsonl"], ["--model", "m"], ["p", "--model", "m", "--demo"]])
def test_half_of_the_arguments(arguments: list[str]) -> None:
    found = CliRunner().invoke(app, ["init", *arguments])
    assert isinstance(found.exception, AlignError) and "PAIRS and --model" in str(found.exception)
