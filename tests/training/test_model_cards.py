"""Model cards: every saved folder has one, it is true, names no path, and its code loads the folder."""

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from align import PreferenceConfig, PreferenceTrainer
from align.config import LossSection, RewardSection, TrainSection
from align.data.table_facts import table_facts
from align.models.model_card import LOCAL, NO_RESULTS, add_results, base_model_id, copy_as_merged
from align.training.train import train_policy
from reward_models.train import train_reward_model
from tests.helpers.builders import bert_reward, rows
from tests.training.test_trainer import FIELDS

PAIRS = Dataset.from_list(rows(8))
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def snippet(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card(folder), flags=re.DOTALL)
    return code


def check_plain(folder: Path, *places: Path) -> None:
    """No path of this machine, no field of a template left empty."""
    text = card(folder)
    assert not [place for place in places if str(place) in text]
    assert not re.search(r"/(tmp|home|root|work)/", text)
    for left in ("More Information Needed", "None", "{", "TODO"):
        assert left not in re.sub(r"```bibtex.*?```", "", text, flags=re.DOTALL), left


@pytest.mark.parametrize("peft", [LORA, None])
def test_the_card_of_a_policy(
    peft: dict[str, Any] | None,
    tiny_policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = TrainSection(
        model=str(tiny_policy), peft=peft,
        methods={"mine": LossSection(loss="madpo", parameters={"tau": 1.5, "c_max": 3.0})},
        trainer=FIELDS | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1},
    )  # fmt: skip
    train_policy(PAIRS, config, "mine", tmp_path, seed=7)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-1"
    for folder, steps in ((tmp_path / "model", 2), (checkpoint, 1)):
        text = card(folder)
        check_plain(folder, tmp_path, tiny_policy)
        assert "`madpo`" in text and "https://arxiv.org/abs/2510.05342" in text and "arxiv:2510.05342" in text
        assert "| tau | 1.5 |" in text and "| c_max | 3.0 |" in text and "| seed | 7 |" in text
        assert f"8 preference pairs, fingerprint `{table_facts(PAIRS).fingerprint}`" in text
        assert f"| steps | {steps} |" in text and NO_RESULTS in text
        assert f"library_name: {'peft' if peft else 'transformers'}" in text and "base_model" not in text
        assert (f"an adapter of {LOCAL}" in text) == (peft is not None)
    assert not (tmp_path / "checkpoints" / "README.md").exists()
    monkeypatch.chdir(tmp_path / "model")
    exec(snippet(tmp_path / "model"), {})  # noqa: S102, RUF100  what a reader of the card does
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("head", ["full", "logistic"])
def test_the_card_of_a_reward_model(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields: dict[str, Any] = {"max_steps": 1, "bf16": False, "per_device_train_batch_size": 4} if head == "full" else {}
    backbone = bert_reward(tmp_path / "backbone")
    section = RewardSection(model=str(backbone), head=head, max_length=64, trainer=fields)  # type: ignore[arg-type]
    train_reward_model(Dataset.from_list(rows(12)), section, tmp_path / "model", seed=0)
    check_plain(tmp_path / "model", tmp_path)
    text = card(tmp_path / "model")
    assert ("`bradley_terry`" if head == "full" else "`logistic`") in text
    assert "12 preference pairs" in text and "pipeline_tag: text-classification" in text
    monkeypatch.chdir(tmp_path / "model")
    exec(snippet(tmp_path / "model"), {})  # noqa: S102, RUF100  what a reader of the card does
    assert re.fullmatch(r"\[-?\d.*\]\n", capsys.readouterr().out)


def test_the_card_of_a_script_has_its_last_held_out_numbers(tiny_policy: Path, tmp_path: Path) -> None:
    """Of each table, at the step that was saved; another training into the same folder does not inherit them."""

    def trained(**more: Any) -> PreferenceTrainer:
        args = PreferenceConfig(
            str(tmp_path / "out"), per_device_train_batch_size=4, bf16=False, use_cpu=True, report_to="none",
            disable_tqdm=True, save_strategy="no", gradient_checkpointing=False, **more,
        )  # fmt: skip
        held = {"near": PAIRS.select(range(3)), "far": PAIRS.select(range(3, 8))} if "eval_steps" in more else None
        trainer = PreferenceTrainer(str(tiny_policy), args=args, train_dataset=PAIRS, eval_dataset=held)
        trainer.train()
        trainer.save_model()
        return trainer

    logged = trained(max_steps=2, eval_strategy="steps", eval_steps=1).state.log_history
    text = card(tmp_path / "out")
    for name in ("near", "far"):
        last = [row for row in logged if f"eval_{name}_loss" in row][-1]
        assert last["step"] == 2 and f"| loss, {name} | {last[f'eval_{name}_loss']:.4g} |" in text
        assert f"| accuracy, {name} | {last['eval_rewards/accuracies']:.4g} |" in text
    assert NO_RESULTS not in text and "without intervals" in text
    trained(max_steps=2)
    assert text == card(tmp_path / "out"), "the same training, whose results stay"
    trained(max_steps=3)
    assert NO_RESULTS in card(tmp_path / "out")


def test_results_are_replaced_and_a_foreign_card_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a\n<!-- results -->\nold\n<!-- /results -->\nb\n", encoding="utf-8")
    add_results(tmp_path, [("reward by the judge", "0.5 (0.4 to 0.6)")], "By vader.")
    assert "| reward by the judge | 0.5 (0.4 to 0.6) |\n\nBy vader.\n<!-- /results -->\nb" in card(tmp_path)
    assert "old" not in card(tmp_path)
    (tmp_path / "README.md").write_text("their own", encoding="utf-8")
    add_results(tmp_path, [("x", "1")], "")
    copy_as_merged(tmp_path, tmp_path)
    assert card(tmp_path) == "their own"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("gpt2", "gpt2"),
        ("/home/me/.cache/hub/models--user--some-model/snapshots/abc", "user/some-model"),
        ("/home/me/model", LOCAL),
        ("./model", LOCAL),
        ("runs/a/train-b/model", LOCAL),
        (None, LOCAL),
    ],
)
def test_the_name_of_a_base_model(name: str | None, shown: str) -> None:
    assert base_model_id(name) == shown


def test_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_model_id("user/model") == LOCAL


def test_the_fingerprint_is_that_of_texts_and_margins() -> None:
    weighted = PAIRS.add_column("weight", [0.5] * 8).remove_columns("id")
    assert table_facts(weighted) == table_facts(PAIRS)
    changed = PAIRS.map(lambda row: row | {"margin": row["margin"] + (row["id"] == "p3")})
    assert table_facts(changed).fingerprint != table_facts(PAIRS).fingerprint
    assert table_facts(PAIRS.select(range(8)[::-1])).fingerprint != table_facts(PAIRS).fingerprint


@pytest.mark.parametrize(
    ("fields", "more", "lines"),
    [
        ({"token_mask": {}, "turns": "last"}, {}, ["| token_mask | {} |", "| turns | last |"]),
        ({"sync_ref_model": True, "weight_decay": 0.1}, {}, ["| sync_ref_model | True |", "| weight_decay | 0.1 |"]),
        ({}, {"ref_model": "given"}, ["| reference | another model, which was given |"]),
        ({}, {"weight": True}, ["| weights | the column `weight` of the pairs |"]),
        ({}, {"copies": True}, ["9 preference pairs", "| pairs left out | 1 (equal responses, or no room for one) |"]),
        ({}, {"bf16": True}, ["| precision | weights in bfloat16 |"]),
        ({}, {"dora": True}, ["| adapter | LORA r=2 lora_alpha=8 lora_dropout=0.1 use_dora=True on down_proj, "
                              "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj (14 modules) |"]),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else "",
)  # fmt: skip
def test_a_card_says_what_is_not_the_default(
    tiny_policy: Path, tmp_path: Path, fields: dict[str, Any], more: dict[str, Any], lines: list[str]
) -> None:
    args = PreferenceConfig(
        str(tmp_path), max_steps=1, bf16=False, use_cpu=True, report_to="none", save_strategy="no", **fields
    )
    loaded = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype="bfloat16" if "bf16" in more else "float32")
    pairs = PAIRS.add_column("weight", [1.0 + k % 2 for k in range(8)]) if "weight" in more else PAIRS
    table = pairs.to_list() + [PAIRS[0] | {"id": "copy", "rejected": PAIRS[0]["chosen"]}] * ("copies" in more)
    lora = LoraConfig(r=2, lora_dropout=0.1, use_dora=True, target_modules="all-linear") if "dora" in more else None
    reference = AutoModelForCausalLM.from_pretrained(tiny_policy) if "ref_model" in more else None
    PreferenceTrainer(loaded, reference, args, train_dataset=table, peft_config=lora).save_model()
    assert [line for line in lines if line not in card(tmp_path)] == []
    usual = ("token_mask", "turns", "sync_ref_model", "weight_decay", "reference", "weights", "pairs left out")
    rows = [f"| {name} |" for name in usual if f"| {name} |" in card(tmp_path)]
    assert [row for row in rows if row not in "".join(lines)] == []
