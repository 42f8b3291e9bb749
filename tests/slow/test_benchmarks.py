"""lm-evaluation-harness for real, on a task of this test: scores, resume, what it refuses."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from align.commands.benchmarks import Benchmarks, measure, read
from align.errors import ConfigError, DataError
from align.models.loading import load_policy, load_tokenizer
from tests.helpers.builders import causal

pytestmark = pytest.mark.slow
QUESTIONS = [
    ("the film is", [" good", " bad"]),
    ("the plot was", [" dull", " fine"]),
    ("a very", [" great", " film"]),
] * 4


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task of multiple choices, whose right answer is the first."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [
        json.dumps({"question": f"{question} {k}", "choices": choices})
        for k, (question, choices) in enumerate(QUESTIONS)
    ]
    (folder / "films.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "films.yaml").write_text(
        "task: films\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'films.jsonl'}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: 0\ntarget_delimiter: ""\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1.0}\n"
    )
    return folder


def accuracy(model: Path) -> list[float]:
    """Whether the model gives the first choice the higher log-probability, question by question."""
    policy, tokenizer = load_policy(str(model), dtype="float32").eval(), load_tokenizer(str(model))
    found = []
    for k, (question, choices) in enumerate(QUESTIONS):
        scores = []
        for choice in choices:
            prompt = tokenizer(f"{question} {k}")["input_ids"]
            ids = tokenizer(f"{question} {k}{choice}")["input_ids"]
            with torch.no_grad():
                logps = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))))
        found.append(float(scores[0] > scores[1]))
    return found


def test_scores_are_the_models_own_and_nothing_is_measured_twice(
    tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, trained = causal(tmp_path / "start", 0), causal(tmp_path / "trained", 1)
    asked = Benchmarks(("films",), include_path=tasks)
    measure([f"p={trained}"], str(start), asked, tmp_path / "eval")
    (row,) = json.loads((tmp_path / "eval/report.json").read_text())["benchmarks"]["policies"]["p"]["rows"]
    before, after = accuracy(start), accuracy(trained)
    assert row["before"] == pytest.approx(sum(before) / len(before))
    assert row["after"] == pytest.approx(sum(after) / len(after))
    assert row["change"]["n"] == len(QUESTIONS)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "eval/benchmarks").rglob("results.json")}
    assert len(files) == 2
    measure([f"p={trained}"], str(start), asked, tmp_path / "eval")
    assert files == {file: file.stat().st_mtime_ns for file in files}, "finished models are not measured again"
    assert "films" in (tmp_path / "eval/report.html").read_text()
    folders = {path.parent.name.split("-")[0]: path for path in files}
    read([f"p={folders['p']}"], str(folders["reference"]), tmp_path / "read")
    again = json.loads((tmp_path / "read/report.json").read_text())["benchmarks"]["policies"]
    assert again["p"]["rows"] == [row]
    capsys.readouterr()


def test_what_the_harness_cannot_do_is_one_message(tmp_path: Path, tasks: Path) -> None:
    model = str(causal(tmp_path / "model"))
    with pytest.raises(ConfigError, match="found no task film, expected one like films"):
        measure([f"p={model}"], model, Benchmarks(("film",), include_path=tasks), tmp_path / "eval")
    (tasks / "films.jsonl").unlink()
    with pytest.raises(DataError, match="benchmarks films: "):
        measure([f"p={model}"], model, Benchmarks(("films",), include_path=tasks), tmp_path / "eval")
    assert not (tmp_path / "eval/report.json").exists()
