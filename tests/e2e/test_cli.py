"""The command line as a user types it: whole runs with tiny models, then with the real small ones."""

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from align.data.pairs import read_pairs
from tests.helpers.builders import rows
from tests.helpers.command_line import align, jsonl


def test_whole_run_then_nothing_to_do_then_only_what_changed(workspace: Path) -> None:
    first = align("run", "run.yaml", cwd=workspace)
    assert first.returncode == 0, first.stderr
    root = workspace / "runs" / "tiny"
    summary = json.loads((root / "summary.json").read_text())
    wanted = {"reward_model_accuracy", "reward_model_accuracy_ci", "judge_reward_before", "judge_reward_after_dpo",
              "judge_reward_after_madpo_ci", "reward_model_gain_madpo_ci", "kl_dpo", "kl_madpo",
              "seconds_per_stage"}  # fmt: skip
    assert wanted <= set(summary)
    page = (root / "report.html").read_text()
    assert "first pair as the model sees it" in first.stderr and "Is it better, or has it only gone further?" in page
    table = read_pairs(root / "margins" / "pairs")
    assert {"id", "prompt", "chosen", "rejected", "margin", "reward_chosen"} <= set(table.column_names)

    stamp = (root / "train-dpo" / "manifest.json").stat().st_mtime_ns
    second = align("run", "run.yaml", cwd=workspace)
    assert second.returncode == 0 and "nothing to do: all" in second.stderr
    assert "running" not in second.stderr

    part = align("train", "run.yaml", cwd=workspace)
    assert part.returncode == 0 and "nothing to do: all" in part.stderr
    assert json.loads((root / "summary.json").read_text()) == summary

    third = align("run", "run.yaml", "--set", "train.methods.madpo.parameters.beta=0.2", cwd=workspace)
    ran = [line.split(":")[0] for line in third.stderr.splitlines() if line.endswith(": running")]
    assert ran == ["train-madpo", "generate-madpo", "evaluate"]
    assert (root / "train-dpo" / "manifest.json").stat().st_mtime_ns == stamp

    other = align("train", "run.yaml", "--set", "train.trainer.learning_rate=0.02", cwd=workspace)
    assert other.returncode == 0, other.stderr
    shown = json.loads((root / "report.json").read_text())
    assert set(shown["training"]["methods"]) == {"dpo", "madpo"} and "evaluation" not in shown
    assert not [key for key in shown["summary"] if key.startswith(("gold", "kl"))]
    back = align("train", "run.yaml", cwd=workspace)
    assert back.returncode == 0, back.stderr
    stamp = (root / "train-dpo" / "manifest.json").stat().st_mtime_ns

    assert not [path for path in root.rglob("*") if path.name.endswith((".partial", ".tmp", ".replaced"))]

    alike = align("run", "run.yaml", "--set", "sample.temperature=1.0e-6", cwd=workspace)
    assert alike.returncode == 2 and "none of 10 prompts gave two different completions" in alike.stderr
    assert (root / "train-dpo" / "manifest.json").stat().st_mtime_ns == stamp


def test_reward_verbs_and_report(workspace: Path) -> None:
    trained = align("reward", "train", "run.yaml", cwd=workspace)
    assert trained.returncode == 0, trained.stderr
    model = workspace / "runs" / "tiny" / "reward" / "model"
    assert model.exists() and not (workspace / "runs" / "tiny" / "sample").exists()
    scored = align("reward", "score", "pairs.jsonl", "--model", str(model), "--output", "scored", cwd=workspace)
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["n"] == 24
    assert "margin" in read_pairs(workspace / "scored").column_names
    kept = (workspace / "scored" / "pairs.parquet").read_bytes()
    beside = align("reward", "score", "pairs.jsonl", "--model", str(model), "--output", ".", cwd=workspace)
    assert beside.returncode == 0, beside.stderr
    assert (workspace / "scored" / "pairs.parquet").read_bytes() == kept
    assert not (workspace / ".scoring").exists() and (workspace / "pairs.parquet").exists()
    assert align("report", "runs/tiny", cwd=workspace).returncode == 0


def test_commands_that_would_do_nothing_or_too_much_say_so(workspace: Path) -> None:
    jsonl(workspace / "own.jsonl", rows(3))
    run = yaml.safe_load((workspace / "run.yaml").read_text())
    reward = run["reward"] | {"pairs": None, "eval_pairs": {"path": "heldout.jsonl"}, "folds": 4}
    (workspace / "own.yaml").write_text(
        yaml.safe_dump({"name": "own", "pairs": {"path": "own.jsonl"}, "reward": reward})
    )
    (workspace / "file").write_text("mine")
    (workspace / "run").mkdir()
    (workspace / "run" / "report.json").write_text('{"run": {}}')
    cases = [
        (("train", "own.yaml"), "own: has no section `train`"),
        (("reward", "train", "own.yaml"), "3 pairs to train on fill 3 parts, fewer than reward.folds: 4"),
        (
            ("data", "check", "own.jsonl", "--column", "weigth=w"),
            "--column: 'weigth' is not a column of the pair table",
        ),
        (
            ("reward", "score", "own.jsonl", "--model", "backbone", "--output", "file"),
            "file: found a file, expected a folder",
        ),
        (
            (
                "eval",
                "reward",
                "a=policy",
                "--reference",
                "policy",
                "--prompts",
                "prompts.jsonl",
                "--output",
                "run",
                "--judge",
                "vader",
            ),
            "report.json: found another report",
        ),
    ]
    for command, said in cases:
        done = align(*command, cwd=workspace)
        told = " ".join(done.stderr.replace("│", "").split())
        assert done.returncode == 2 and said in told and "Traceback" not in told, told
    assert (workspace / "run" / "report.json").read_text() == '{"run": {}}'
    (workspace / "a[b].jsonl").write_bytes((workspace / "own.jsonl").read_bytes())
    assert "a[b].jsonl" in align("data", "check", "a[b].jsonl", cwd=workspace).stdout
    plain = align("train", "run.yaml", "--set", "train.trainer.save_strategy=no", "--dry-run", cwd=workspace)
    assert plain.returncode == 0, plain.stderr


def test_the_table_that_is_read_is_not_replaced(workspace: Path) -> None:
    Dataset.from_list([row | {"annotator": "a"} for row in rows(4)]).to_parquet(str(workspace / "pairs.parquet"))
    before = (workspace / "pairs.parquet").read_bytes()
    for source in ("pairs.parquet", "*.parquet"):
        for verb in (("data", "check", source, "--drop-invalid"), ("reward", "score", source, "--model", "backbone")):
            done = align(*verb, "--output", ".", cwd=workspace)
            assert done.returncode == 2 and "pairs.parquet: is read, and would be replaced" in done.stderr
    assert (workspace / "pairs.parquet").read_bytes() == before
    (workspace / "pairs.parquet").rename(workspace / "kept.parquet")
    for source in ("kept.parquet", "."):
        done = align("filter", "run", source, "--output", ".", cwd=workspace)
        assert done.returncode == 2 and "kept.parquet: is read, and would be replaced" in done.stderr
    assert (workspace / "kept.parquet").read_bytes() == before


def test_pairs_with_margins_need_no_reward_model(workspace: Path) -> None:
    jsonl(workspace / "own.jsonl", rows(12))
    run = yaml.safe_load((workspace / "run.yaml").read_text())
    run = {"name": "own", "pairs": {"path": "own.jsonl"}, "train": run["train"]}
    (workspace / "own.yaml").write_text(yaml.safe_dump(run))
    done = align("train", "own.yaml", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert (workspace / "runs" / "own" / "train-madpo" / "model" / "adapter_model.safetensors").exists()


def test_conversational_pairs_cross_fitted_on_themselves(workspace: Path) -> None:
    def turns(role: str, text: object) -> list[dict[str, object]]:
        return [{"role": role, "content": text}]

    chat = [
        {"prompt": turns("user", row["prompt"]), "chosen": turns("assistant", row["chosen"]),
         "rejected": turns("assistant", row["rejected"])}
        for row in rows(20)
    ]  # fmt: skip
    jsonl(workspace / "chat.jsonl", chat)
    run = yaml.safe_load((workspace / "run.yaml").read_text())
    run["reward"] |= {"pairs": None, "eval_pairs": None, "eval_fraction": 0.2}
    run = {"name": "chat", "pairs": {"path": "chat.jsonl"}, "reward": run["reward"], "train": run["train"]}
    (workspace / "chat.yaml").write_text(yaml.safe_dump(run))
    done = align("run", "chat.yaml", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert "user : the " in done.stderr and "assistant :" in done.stderr
    margins = read_pairs(workspace / "runs" / "chat" / "margins" / "pairs")
    crossfit = read_pairs(workspace / "runs" / "chat" / "crossfit" / "pairs")
    assert list(margins["margin"]) == list(crossfit["margin"])


def test_another_source_of_the_reward_models_pairs_in_the_same_folder(workspace: Path) -> None:
    """Results of an earlier configuration are neither trained on nor reused for this one."""
    jsonl(workspace / "others.jsonl", [{**row, "prompt": f"others {row['prompt']}"} for row in rows(20)])
    run = yaml.safe_load((workspace / "run.yaml").read_text())
    reward = run["reward"] | {"eval_pairs": None, "eval_fraction": 0.2, "folds": 0}
    root = workspace / "runs" / "own"
    for pairs, policy_rows in (("others.jsonl", 24), (None, 20), ("others.jsonl", 24)):
        tree = {
            "name": "own",
            "pairs": {"path": "pairs.jsonl"},
            "reward": reward | {"pairs": pairs and {"path": pairs}},
        }
        (workspace / "own.yaml").write_text(yaml.safe_dump(tree))
        done = align("run", "own.yaml", cwd=workspace)
        assert done.returncode == 0, done.stderr
        asked = read_pairs(root / "reward" / "in_sample")["prompt"]
        assert all(prompt.startswith("others") == (pairs is not None) for prompt in asked)
        assert abs(len(read_pairs(root / "margins" / "pairs")) - policy_rows) <= 2
        sets = json.loads((root / "report.json").read_text())["data"]["sets"]
        assert any(part["name"].startswith("pairs-reward") for part in sets) == (pairs is not None)


MISTAKES = [
    ("train.methods.madpo.loss=madpoo", "did you mean `madpo`?"),
    ("train.methods.madpo.parameters.c_max=0.5", "c_max: found 0.5, expected a number above 1"),
    (
        "train.trainer.learning_rat=1",
        "train.trainer.learning_rat: not a field of DPOConfig (did you mean `learning_rate`?)",
    ),
    ("train.peft.rr=1", "train.peft.rr: not a field of peft.LoraConfig"),
    ("reward.trainer.num_train_epochs=many", "reward.trainer.num_train_epochs: found 'many', expected a number"),
    ("evaluate.prompts=nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("evaluate.judge=taste", "judge 'taste' is not known"),
]


@pytest.mark.parametrize(("override", "said"), MISTAKES)
def test_a_mistake_costs_one_line_and_no_work(workspace: Path, override: str, said: str) -> None:
    for verb in (["run", "run.yaml"], ["run", "run.yaml", "--dry-run"]):
        failed = align(*verb, "--set", override, cwd=workspace)
        assert failed.returncode == 2 and said in failed.stderr and "Traceback" not in failed.stderr
    assert not (workspace / "runs").exists()


def test_dry_run_prints_the_plan(workspace: Path) -> None:
    planned = align("run", "run.yaml", "--dry-run", cwd=workspace)
    plan = json.loads(planned.stdout)
    assert list(plan["stages"])[:3] == ["pairs-reward", "reward", "crossfit"] and list(plan["stages"])[-1] == "evaluate"
    assert not (workspace / "runs").exists()


def test_data_check(workspace: Path) -> None:
    good = align("data", "check", "pairs.jsonl", cwd=workspace)
    assert good.returncode == 0 and "valid pairs" in good.stdout
    with (workspace / "pairs.jsonl").open("a") as stream:
        stream.write('{"prompt": "a", "chosen": "", "rejected": "b"}\n')
    bad = align("data", "check", "pairs.jsonl", cwd=workspace)
    assert bad.returncode == 2 and "pairs.jsonl:row 25:chosen: found empty text" in bad.stdout
    apart = align("data", "check", "pairs.jsonl", "--drop-invalid", "--output", "clean", cwd=workspace)
    assert apart.returncode == 0 and len(read_pairs(workspace / "clean")) == 24
    assert json.loads((workspace / "clean" / "invalid.jsonl").read_text())["row"] == 25
    scored = {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2, "score_rejected": 1}
    (workspace / "scored.jsonl").write_text(json.dumps(scored) + "\n")
    named = " ".join(align("data", "check", "scored.jsonl", cwd=workspace).stdout.split())
    assert (
        "2 columns not used: score_chosen, score_rejected (map them with --column reward_chosen=score_chosen" in named
    )
    assert align("data", "check", "none.jsonl", cwd=workspace).returncode == 2
    assert align("--log-level", "loud", "data", "check", "pairs.jsonl", cwd=workspace).returncode == 2


@pytest.mark.model
def test_real_models(assets: Path, tmp_path: Path) -> None:
    """MiniLM as reward model, SmolLM2 as policy, margins and MADPO on a few pairs of sentences."""
    praise, blame = ["wonderful", "a delight", "moving and funny"], ["awful", "a waste of time", "dull and long"]
    table = [
        {"prompt": f"Review of film {k}: it was", "chosen": f" {praise[k % 3]}.", "rejected": f" {blame[k % 3]}."}
        for k in range(24)
    ]
    Dataset.from_list(table).to_parquet(str(tmp_path / "pairs.parquet"))
    jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Review of film {k}: it was"} for k in range(100, 104)])
    small = {"per_device_train_batch_size": 8, "bf16": False, "gradient_checkpointing": False}
    run = {
        "name": "real", "pairs": {"path": "pairs.parquet"},
        "reward": {"model": str(assets / "minilm"), "eval_fraction": 0.25, "max_length": 64,
                   "trainer": small | {"max_steps": 12, "learning_rate": 2e-4}},
        "train": {"model": str(assets / "smollm2"), "methods": {"madpo": {"loss": "madpo"}},
                  "trainer": small | {"max_steps": 3, "learning_rate": 2e-4},
                  "peft": {"r": 8, "target_modules": ["q_proj", "v_proj"]}},
        "evaluate": {"prompts": "prompts.jsonl", "max_new_tokens": 8, "judge": "vader"},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    done = align("run", "run.yaml", cwd=tmp_path, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "real" / "summary.json").read_text())
    assert summary["reward_model_accuracy"] == 1.0 and summary["kl_madpo"] is not None
    history = json.loads((tmp_path / "runs" / "real" / "train-madpo" / "history.json").read_text())["history"]
    assert float(history[-1]["rewards/margins"]) > float(history[0]["rewards/margins"])


def test_filter_is_a_stage_of_a_run(workspace: Path) -> None:
    """Training sees what was kept; another share trains again, the same one does not."""
    jsonl(workspace / "own.jsonl", rows(12))
    run = yaml.safe_load((workspace / "run.yaml").read_text())
    filtered = {"keep": 0.5, "embedding_model": "backbone", "skip": ["near_duplicate"]}
    run = {"name": "own", "pairs": {"path": "own.jsonl"}, "filter": filtered, "train": run["train"]}
    (workspace / "own.yaml").write_text(yaml.safe_dump(run))
    done = align("train", "own.yaml", cwd=workspace)
    assert done.returncode == 0, done.stderr
    stage = workspace / "runs" / "own" / "filter"
    kept = Dataset.from_parquet(str(stage / "kept.parquet"))
    dropped = Dataset.from_parquet(str(stage / "dropped.parquet"))
    assert len(kept) == 6 and sorted([*kept["id"], *dropped["id"]]) == sorted(row["id"] for row in rows(12))
    assert json.loads((stage / "manifest.json").read_text())["stage"] == "filter"
    page = (workspace / "runs" / "own" / "report.html").read_text()
    assert "6 of 12 pairs were trained on" in page and 'href="filter/report.html"' in page
    again = align("train", "own.yaml", cwd=workspace)
    assert "filter: up to date, skipped" in again.stderr and "train-dpo: up to date, skipped" in again.stderr
    less = align("train", "own.yaml", "--set", "filter.keep=0.25", cwd=workspace)
    assert less.returncode == 0 and "margins: up to date" in less.stderr and "train-dpo: done" in less.stderr
    assert len(Dataset.from_parquet(str(stage / "kept.parquet"), keep_in_memory=True)) == 3
