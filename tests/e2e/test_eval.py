"""`align eval` on the command line with tiny models, killed in the middle; marked tests use the real small model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bad_input_makers import run_command
from tests.helpers.builders import WORDS, causal, llama_reward, rows

BAD = "<script>alert(1)</script>"


def align(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "align.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


def write_prompts(folder: Path, count: int) -> None:
    texts = [f"the {WORDS[k % 6]} film {'very ' * (k // 6 % 5)}is {k}" for k in range(count)]
    texts[0] = BAD
    lines = (json.dumps({"prompt": text}) + "\n" for text in texts)
    (folder / "prompts.jsonl").write_text("".join(lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    causal(tmp_path / "base")
    causal(tmp_path / "one", seed=1)
    causal(tmp_path / "two", seed=2)
    write_prompts(tmp_path, 70)
    return tmp_path


SHARED = ["--prompts", "prompts.jsonl", "--output", "out", "--max-new-tokens", "6", "--judge", "vader"]


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "report.json").read_text())


def test_a_reward_model_judge_reads_as_many_tokens_as_asked(folder: Path) -> None:
    """Its scores are cached for each limit of tokens; another kind of judge takes no limit.

    Every prompt but the first has five words or more, of which the judge reads four.
    """

    def preferences() -> list[float]:
        (found,) = read(folder)["comparisons"].values()
        return [sample["preference"] for sample in found["samples"]]

    llama_reward(folder / "rm")
    command = ["eval", "compare", "one", "two", *SHARED, "--judge", "./rm"]
    short = align(*command, "--max-length", "5", folder=folder)
    assert short.returncode == 0, short.stderr
    said = re.findall(r"(\d+) of (?:64|6) completions are not read: their prompts fill max_length", short.stderr)
    assert len(said) == 4 and sum(int(count) for count in said) > 120 and set(preferences()[1:]) == {0.5}
    wide = align(*command, folder=folder)
    assert wide.returncode == 0, wide.stderr
    assert "are not read" not in wide.stderr and set(preferences()[1:]) > {0.0, 1.0}
    again = align(*command, "--max-length", "5", folder=folder)
    assert again.returncode == 0 and again.stderr.count("up to date, skipped") == 4
    refused = align("eval", "compare", "one", "two", *SHARED, "--max-length", "5", folder=folder)
    assert refused.returncode == 2 and "--max-length: found 5 for the judge vader" in refused.stderr


def test_three_policies_and_random_numbers_of_their_own(folder: Path) -> None:
    """One table and every two; a copy of a policy writes its texts, and with random numbers of its own other ones."""
    shutil.copytree(folder / "one", folder / "copy")
    three = ["eval", "compare", "one", "two", "copy"]
    done = align(*three, *SHARED, folder=folder)
    assert done.returncode == 0, done.stderr
    found = read(folder)
    assert len(found["comparisons"]) == 3 and {row["policy"] for row in found["win_tables"]["vader"]} == {
        "one",
        "two",
        "copy",
    }
    twins = found["comparisons"]["one against copy, vader"]
    (same,) = twins["identical_texts"]
    assert same["identical"] == same["n"] == 70 and twins["win_rate"]["rate"]["value"] == 0.5
    assert found["comparisons"]["two against copy, vader"]["win_rate"]["rate"]["value"] == pytest.approx(
        1 - found["comparisons"]["one against two, vader"]["win_rate"]["rate"]["value"]
    )
    assert "All against all" in (folder / "out" / "report.html").read_text()
    apart = align(*three, *SHARED, "--independent-seeds", folder=folder)
    assert apart.returncode == 0, apart.stderr
    (same,) = read(folder)["comparisons"]["one against copy, vader"]["identical_texts"]
    assert same["identical"] < 10 and "random numbers of their own" in (folder / "out" / "report.html").read_text()
    refused = align("eval", "compare", "one", *SHARED, folder=folder)
    assert refused.returncode == 2 and "found 1, expected two or more" in refused.stderr


def test_three_commands_fill_one_page(folder: Path) -> None:
    rewarded = align("eval", "reward", "one", "two", "--reference", "base", *SHARED, folder=folder)
    assert rewarded.returncode == 0, rewarded.stderr
    printed = json.loads(rewarded.stdout)
    assert printed["policies"]["one"]["kl"]["value"] > 0 and printed["policies"]["reference"]["kl"] is None
    compared = align("eval", "compare", "one", "two", *SHARED, folder=folder)
    assert compared.returncode == 0, compared.stderr
    assert compared.stderr.count("up to date, skipped") == 4  # completions and scores of both were there
    win = json.loads(compared.stdout)["win_rate"]
    rewards = [{n: c["reward"] for n, c in s["completions"].items()} for s in read(folder)["reward"]["samples"]]
    ahead = [1.0 if r["one"] > r["two"] else 0.5 if r["one"] == r["two"] else 0.0 for r in rewards]
    assert len(ahead) == 70 and win["rate"]["value"] == pytest.approx(sum(ahead) / 70)
    front = align("eval", "frontier", "one", "--reference", "base", "--temperature", "0", "--temperature", "1",
                  *SHARED, folder=folder)  # fmt: skip
    assert front.returncode == 0, front.stderr
    points = {(p["policy"], p["temperature"]): p for p in json.loads(front.stdout)["points"]}
    assert set(points) == {(name, heat) for name in ("reference", "one") for heat in (0.0, 1.0)}
    assert points["one", 1.0]["reward"] == printed["policies"]["one"]["reward"]
    assert points["one", 1.0]["kl"] == printed["policies"]["one"]["kl"]
    assert points["reference", 0.0]["kl"]["value"] > 0  # greedy decoding has left the reference too
    report = read(folder)
    assert set(report) == {"reward", "comparisons", "frontier"}
    page = (folder / "out" / "report.html").read_text()
    assert BAD not in page and "&lt;script&gt;alert(1)" in page and page.count("Not measured") == 1
    before = page
    assert align("eval", "page", "out", folder=folder).returncode == 0
    assert (folder / "out" / "report.html").read_text() == before


def test_checkpoints_of_a_training(folder: Path) -> None:
    (folder / "checkpoints").mkdir()
    for step, source in ((2, "one"), (10, "two")):
        (folder / source).rename(folder / "checkpoints" / f"checkpoint-{step}")
    done = align("eval", "frontier", "one=checkpoints/checkpoint-10", "--checkpoints", "one=checkpoints",
                 "--reference", "base", "--temperature", "1", *SHARED, folder=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)["points"]
    assert [(p["policy"], p["step"]) for p in points] == [("reference", None), ("one", None), ("one", 2), ("one", 10)]
    assert points[1]["reward"] == points[3]["reward"]  # the last checkpoint is the policy
    assert "one checkpoints" in (folder / "out" / "report.html").read_text()


def test_killed_evaluations_go_on_and_repeat_no_finished_prompt(tmp_path: Path) -> None:
    """500 prompts, two policies, SIGKILL while each of them is sampled: the final numbers are the same."""
    causal(tmp_path / "one", seed=1)
    causal(tmp_path / "two", seed=2)
    write_prompts(tmp_path, 500)
    shared = ["eval", "compare", "one", "two", "--judge", "vader", "--prompts", "prompts.jsonl"]
    shared += ["--max-new-tokens", "48"]
    command = [sys.executable, "-m", "align.cli", *shared, "--output", "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished: dict[Path, int] = {}
    for policy in ("one", "two"):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
        pattern = f"out/completions/{policy}-*.partial/parts/sampled/*.parquet"
        end = time.monotonic() + 240
        while len(list(tmp_path.glob(pattern))) < 2:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
        found = {file.relative_to(tmp_path): file.stat().st_mtime_ns for file in tmp_path.glob(pattern)}
        assert 2 <= len(found) < 8
        finished |= found
        whole = list(tmp_path.glob("out/completions/*/completions.parquet"))
        assert len(whole) == (policy == "two")
    watched = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    seen: dict[Path, int] = {}
    while watched.poll() is None:
        for file in tmp_path.glob("out/completions/two-*.partial/parts/sampled/*.parquet"):
            try:
                seen[file.relative_to(tmp_path)] = file.stat().st_mtime_ns
            except FileNotFoundError:
                break
        time.sleep(0.005)
    assert watched.returncode == 0
    kept = {file: stamp for file, stamp in finished.items() if "two-" in str(file)}
    assert len(seen) > len(kept) and all(seen[file] == stamp for file, stamp in kept.items())
    uninterrupted = align(*shared, "--output", "again", folder=tmp_path)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    one, other = (json.loads((tmp_path / o / "report.json").read_text())["comparisons"] for o in ("out", "again"))
    (key,) = one
    assert one[key]["win_rate"] == other[key]["win_rate"] and one[key]["samples"] == other[key]["samples"]
    assert one[key]["win_rate"]["rate"]["n"] == 500


def write_rewardbench(folder: Path) -> None:
    subsets = ["alpacaeval-easy", "hep-python", "donotanswer"]
    pairs = [
        {"id": k, "prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"],
         "chosen_model": "x", "rejected_model": "y", "subset": subsets[k % 3]}
        for k, row in enumerate(rows(60))
    ]  # fmt: skip
    (folder / "bench.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def test_a_reward_model_on_rewardbench_rows(tmp_path: Path) -> None:
    llama_reward(tmp_path / "rm")
    write_rewardbench(tmp_path)
    command = ["eval", "reward-model", "bench.jsonl", "--model", "rm", "--output", "out"]
    done = align(*command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "as chat" in done.stderr
    found = json.loads(done.stdout)
    assert found["n"] == 60 and found["run"]["chat"] is True
    assert {name: item["accuracy"]["n"] for name, item in found["categories"].items()} == {
        "alpacaeval-easy": 20, "hep-python": 20, "donotanswer": 20,
    }  # fmt: skip
    assert set(found["rewardbench"]["sections"]) == {"Chat", "Safety", "Reasoning"}
    assert found["rewardbench"]["overall"] is None and "llmbar-natural" in found["rewardbench"]["missing"]
    report = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    assert len(report["margins"]) == 60
    assert "<script" not in (tmp_path / "out" / "reward_model.html").read_text()
    again = align(*command, folder=tmp_path)
    assert "up to date, skipped" in again.stderr and json.loads(again.stdout)["accuracy"] == found["accuracy"]
    text = align(*command, "--text", folder=tmp_path)
    assert "as chat" not in text.stderr and json.loads(text.stdout)["log_loss"] != found["log_loss"]


def test_a_reward_model_says_which_pairs_are_unlike_its_own(tmp_path: Path) -> None:
    llama_reward(tmp_path / "rm")
    write_rewardbench(tmp_path)
    lines = "".join(json.dumps(row) + "\n" for row in rows(40))
    (tmp_path / "trained.jsonl").write_text(lines)
    command = ["eval", "reward-model", "bench.jsonl", "--model", "rm", "--output", "out"]
    done = align(*command, "--text", "--trained-on", "trained.jsonl", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    assert len(report["ood"]["distances"]) == 60 and 0 <= report["ood"]["share"] < 1
    page = (tmp_path / "out" / "reward_model.html").read_text()
    assert "of training pairs that were held back lie below" in page and "Does it pay for length?" in page
    refused = align(*command, "--trained-on", "trained.jsonl", folder=tmp_path)
    assert refused.returncode == 2 and "[eval-trained-on] --trained-on trained.jsonl" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reward", "one", *SHARED], "--reference: needed"),
        (["reward", "one", "one", "--reference", "base", *SHARED], "'one' is there twice"),
        (["reward", "one", "--reference", "base", *SHARED, "--judge", "llm:base"], "only says which of two"),
        (["compare", "one", "two", *SHARED, "--judge", "vadr"], "did you mean `vader`"),
        (["compare", "one", "nothing", *SHARED], "nothing: cannot be loaded as a causal language model"),
        (["frontier", "one", "--reference", "base", "--checkpoints", "one=base", *SHARED], "no folder checkpoint-<s"),
        (["reward", "one", "--reference", "base", "--engine", "server", *SHARED], "--engine server: found a server"),
        (["compare", "one", "two", "--engine", "vlm", *SHARED], "did you mean `vllm`"),
        (["reward", "one", "--reference", "base", *SHARED[:2], "--output", "prompts.jsonl"], "found a file, expected"),
        (["page", "broken"], "broken/report.json: not the report of an evaluation"),
        (["reward", "one", "--reference", "base", *SHARED, "--output", "broken"], "not the report of an eval"),
        (["page", "other"], "other/report.json: not the report of an evaluation"),
        (["reward", "adapter", *SHARED], "adapter/adapter_config.json: not valid JSON"),
        (["page", "nowhere"], "holds no report.json"),
        (["compare", "one", "two", *SHARED, "--prompts", "no.jsonl"], "no.jsonl: no such file"),
        (["reward-model", "prompts.jsonl", "--model", "base", "--output", "out"], "no column 'chosen'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_message(folder: Path, arguments: list[str], message: str) -> None:
    for name, text in (("broken", "{"), ("other", '{"reward": {"policies": 3}}')):
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(text)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{")
    code, _, errors = run_command(("eval", *arguments), folder)
    assert code == 2 and message in errors and "Traceback" not in errors, errors


@pytest.mark.model
def test_the_real_model_judges_in_both_orders(assets: Path, tmp_path: Path) -> None:
    """A small language model as the judge is biased by the order; both orders are asked, and the bias is reported."""
    texts = ["The film was a", "I had dinner at a place that", "The best thing about this camera is"]
    lines = (json.dumps({"prompt": text}) + "\n" for text in texts)
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    model = str(assets / "smollm2")
    done = align("eval", "compare", f"warm={model}", f"again={model}", *SHARED, "--judge", f"llm:{model}",
                 folder=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["win_rate"]
    assert found["rate"]["value"] == pytest.approx(0.5)  # the same completions: any preference is the order's
    assert abs(found["position_bias"]["value"]) > 0.01
