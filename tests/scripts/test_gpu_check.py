"""The checks of what only a GPU can show: no case stops another, and each says why it is left out or failed."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from align.training.preference_config import PreferenceConfig
from align.training.trainer import PreferenceTrainer
from scripts.gpu_check import exactness, processes, run, sampling, speed, training
from scripts.gpu_check.cases import FAILED, LEFT_OUT, PASSED, Settings, Wrong, judge, need, run_cases
from scripts.gpu_check.page import write_page
from tests.helpers.builders import causal, rows


def settings(folder: Path, model: str = "") -> Settings:
    return Settings(model, pairs=2, prompt=6, completion=4, steps=1, work=str(folder), lora=False)


def test_a_case_never_stops_the_others(tmp_path: Path) -> None:
    def left_out(_: Settings) -> dict[str, Any]:
        need(False, "two GPUs")
        return {}

    def broken(_: Settings) -> dict[str, Any]:
        raise ValueError("a <b>shape</b>\nand more")

    def wrong(_: Settings) -> dict[str, Any]:
        return judge({"loss": math.nan}, {"loss": 1.0})

    cases = {"left out": left_out, "broken": broken, "wrong": wrong, "fine": lambda _: judge({"a": 1.0}, {"a": 1.0})}
    run_cases(cases, settings(tmp_path), tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert [found[name]["outcome"] for name in cases] == [LEFT_OUT, FAILED, FAILED, PASSED]
    assert found["left out"]["reason"] == "two GPUs"
    assert found["broken"]["reason"] == "ValueError: a <b>shape</b>"
    assert found["wrong"]["reason"].startswith("loss: found nan")
    report = {
        "machine": run.machine(), "settings": {"model": "m", "pairs": 2, "lora": False}, "checks": {"a": found},
        "counts": {PASSED: 1, FAILED: 2, LEFT_OUT: 1},
    }  # fmt: skip
    write_page(tmp_path / "page.html", report)
    page = (tmp_path / "page.html").read_text()
    assert "1 cases passed, 2 failed, 1 were left out" in page
    assert "&lt;b&gt;shape" in page and "<b>shape" not in page


def test_a_number_above_its_limit_is_wrong() -> None:
    with pytest.raises(Wrong, match=r"norm: found 0\.2, expected at most 0\.1") as found:
        judge({"norm": 0.2, "loss": 0.0}, {"loss": 0.1, "norm": 0.1})
    assert found.value.numbers == {"norm": 0.2, "loss": 0.0, "limits": {"loss": 0.1, "norm": 0.1}}


def test_a_process_that_dies_is_told_with_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started = {"first": {"outcome": PASSED, "reason": "", "numbers": {}, "seconds": 1.0}}
        started["second"] = {"outcome": FAILED, "reason": "the process ended in this case", "numbers": {}, "seconds": 0}
        (tmp_path / f"{command[command.index('--check') + 1]}.json").write_text(json.dumps(started))
        return subprocess.CompletedProcess(command, -11)

    monkeypatch.setattr(run.subprocess, "run", dies)
    report = run.check_all(settings(tmp_path), ["exactness", "speed"], tmp_path)
    assert report["counts"] == {PASSED: 2, FAILED: 2}
    reason = report["checks"]["speed"]["second"]["reason"]
    assert reason == "the process ended in this case: its process ended with -11, see " + str(tmp_path / "speed.log")
    monkeypatch.setattr(run.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    only = run.run_check("speed", settings(tmp_path), tmp_path)
    assert only["speed"]["outcome"] == FAILED
    assert run.JSON in {file.name for file in tmp_path.iterdir()}


def test_what_a_cpu_cannot_run_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    here = settings(tmp_path)
    all_cases = exactness.cases() | processes.cases() | speed.cases()
    names = [name for name in all_cases if "fl" in name.split()[-1] or name.startswith(("FSDP2", "QLoRA"))]
    names += [name for name in all_cases if name.endswith("Liger")]
    assert len(names) == 6 + 3 + 2
    run_cases({name: all_cases[name] for name in names}, here, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert {case["outcome"] for case in found.values()} == {LEFT_OUT}
    assert all("GPU" in case["reason"] or "is not installed" in case["reason"] for case in found.values())
    if not any(Path(path, "vllm").exists() for path in sys.path):
        run_cases(sampling.cases(), here, tmp_path / "vllm.json")
        assert {case["outcome"] for case in json.loads((tmp_path / "vllm.json").read_text()).values()} == {LEFT_OUT}


def test_a_wrong_layout_would_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = settings(tmp_path, str(causal(tmp_path / "model")))
    numbers = exactness.cases()["bfloat16 shared_prefix sdpa"](here)
    assert 0 < numbers["logps"] <= numbers["limits"]["logps"] < 0.1

    right = exactness.pair_logps

    def shifted(model: Any, batch: dict[str, Any], layout: Any) -> Any:
        batch = batch | {"input_ids": batch["input_ids"].roll(1, dims=0)} if layout == "shared_prefix" else batch
        return right(model, batch, layout)

    monkeypatch.setattr(exactness, "pair_logps", shifted)
    with pytest.raises(Wrong):
        exactness.cases()["bfloat16 shared_prefix sdpa"](here)


def test_trl_without_its_fused_head_is_trl(tmp_path: Path) -> None:
    here = settings(tmp_path, str(causal(tmp_path / "model")))
    plain, fused = (training.train(kind, here, steps=2, bf16=False, rate=1e-3) for kind in training.KINDS[1::-1])
    assert plain.losses == pytest.approx(fused.losses, abs=1e-5)
    assert plain.norms == pytest.approx(fused.norms, rel=1e-4)
    assert fused.losses[0] != fused.losses[1]
    assert fused.tokens == plain.tokens > 2 * (5 + 3 + 3)
    assert len(fused.seconds) == 2


def test_an_adapter_whose_base_moves_is_wrong(tmp_path: Path) -> None:
    args = PreferenceConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", bf16=False,
        use_cpu=True,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

    def made() -> PreferenceTrainer:
        return PreferenceTrainer(
            str(causal(tmp_path / "model")), args=args, train_dataset=rows(4), peft_config=adapter
        )  # fmt: skip

    numbers = processes.adapter_alone(made())
    assert numbers["frozen"] > 10 and numbers["change of the loss"] < 0
    moved = made()

    frozen = next(weight for weight in moved.model.parameters() if not weight.requires_grad)
    train = moved.train
    moved.train = lambda: (frozen.data.add_(1e-3), train())  # type: ignore[assignment]
    with pytest.raises(Wrong, match="frozen and changed: found 1"):
        processes.adapter_alone(moved)


@pytest.mark.slow
def test_the_whole_runs_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.gpu_check.run", "--output", str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    report = json.loads((tmp_path / run.JSON).read_text())
    assert done.returncode == (1 if report["counts"].get(FAILED) else 0)
    failed = {name: case for found in report["checks"].values() for name, case in found.items()
              if case["outcome"] == FAILED}  # fmt: skip
    assert failed == {}
    assert set(report["checks"]) == set(run.CHECKS)
    assert report["checks"]["processes"]["DDP, all weights"]["outcome"] == PASSED
    assert report["checks"]["speed"]["speed of shared_prefix"]["numbers"]["tokens a second"] > 0
    assert (tmp_path / run.PAGE).exists()
