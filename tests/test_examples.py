"""Each script of examples/ does its job, on tiny models under the names of docs/python.md."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.builders import llama_reward
from tests.helpers.python_page import write_page_folder

EXAMPLES = Path(__file__).parents[1] / "examples"
POLICY, BACKBONE = "HuggingFaceTB/SmolLM2-135M-Instruct", "distilbert-base-uncased"
SHORT = [
    "--max_steps",
    "2",
    "--per_device_train_batch_size",
    "4",
    "--bf16",
    "false",
    "--use_cpu",
    "--report_to",
    "none",
]


def run(name: str, *options: str) -> None:
    """Run a script as ``python examples/NAME OPTIONS`` does."""
    sys.argv = [name, *options]
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_page_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_dpo_trains_an_adapter_under_madpo(folder: Path) -> None:
    given = ["--model_name_or_path", POLICY, "--dataset_name", "pairs.jsonl", "--output_dir", "trained"]
    loss = ["--loss", "madpo", "--loss_kwargs", '{"tau": 1.5}']
    run("dpo.py", *given, *loss, "--use_peft", "--lora_target_modules", "q_proj", "v_proj", *SHORT)
    card = (folder / "trained" / "README.md").read_text()
    assert "`madpo`" in card and "| tau | 1.5 |" in card and "library_name: peft" in card


def test_reward_model_is_trained_and_saved(folder: Path) -> None:
    given = ["--model_name_or_path", BACKBONE, "--dataset_name", "pairs.jsonl", "--output_dir", "trained"]
    run("reward_model.py", *given, "--max_length", "64", *SHORT)
    card = (folder / "trained" / "README.md").read_text()
    assert "`bradley_terry`" in card and "preference pairs, fingerprint" in card
    assert (folder / "trained" / "model.safetensors").exists()


@pytest.mark.parametrize(("name", "model", "lines"), [("dpo.py", POLICY, 2), ("reward_model.py", "backbone", 1)])
def test_a_script_with_trl_s_imports_trains_the_same_weights(folder: Path, name: str, model: str, lines: int) -> None:
    """Each changed line says what it was; with these lines the script is trl's."""
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    texts = [json.dumps({key: pair[key] for key in ("prompt", "chosen", "rejected")}) for pair in pairs]
    (folder / "texts.jsonl").write_text("\n".join(texts))
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    theirs, changed = re.subn(r"^from .*# was: (from trl import .*)$", r"\1", text, flags=re.MULTILINE)
    assert changed == lines and not re.search(r"^from (align|reward_models)", theirs, flags=re.MULTILINE)
    (folder / "trl.py").write_text(theirs)
    llama_reward(folder / "backbone")
    given = ["--model_name_or_path", model, "--dataset_name", "texts.jsonl", "--max_length", "64", *SHORT]
    for script, output in ((EXAMPLES / name, "ours"), (folder / "trl.py", "theirs")):
        sys.argv = [name, *given, "--output_dir", output, "--optim", "sgd", "--learning_rate", "0.1"]
        runpy.run_path(str(script), run_name="__main__")
    ours, others = (load_file(folder / output / "model.safetensors") for output in ("ours", "theirs"))
    assert ours.keys() == others.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, others[key], rtol=1e-4, atol=1e-6)


def test_filter_keeps_a_share(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("filter.py", "pairs.jsonl", "kept.jsonl", "--keep", "0.5")
    kept = [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()]
    total = len((folder / "pairs.jsonl").read_text().splitlines())
    assert 0 < len(kept) <= total / 2 + 1 and {"prompt", "chosen", "rejected"} <= kept[0].keys()
    assert "reason" in capsys.readouterr().out


def test_entanglement_describes_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    run("entanglement.py", POLICY, "pairs.jsonl", "--count", "4")
    shown = capsys.readouterr().out
    assert "chosen_change" in shown and "verdict" in shown


def test_compare_names_the_winner(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("compare.py", "out", POLICY, "prompts.jsonl", "--judge", "rm", "--max-new-tokens", "4", "--page", "page.html")
    assert "out wins 0." in capsys.readouterr().out and (folder / "page.html").stat().st_size > 1000
