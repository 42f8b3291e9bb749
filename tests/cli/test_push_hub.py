"""`align push` to the hub: what is planned, what is uploaded, who may read it; and a trainer's own push_to_hub."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest
import transformers.utils.hub
from datasets import Dataset
from safetensors.torch import load_file

from align import PreferenceConfig, PreferenceTrainer
from align.commands.push import push
from align.data.pairs import write_pairs
from align.errors import AlignError
from tests.helpers.builders import rows, trained_adapter
from tests.helpers.hub_server import TOKEN, Hub, serve

PAIRS = Dataset.from_list(rows(8))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # keeps the address of its first use
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def adapter(tiny_policy: Path, tmp_path: Path) -> Path:
    """An adapter as a trainer leaves it in its output_dir: with checkpoints and a pickle."""
    folder = trained_adapter(tiny_policy, tmp_path / "adapter", 0)
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "adapter_config.json").write_text("{}")
    return folder


def test_a_dry_run_lists_files_and_sizes_without_network(adapter: Path, hub: Hub) -> None:
    planned = push(adapter, "hf://user/mine", dry_run=True, base_model="org/base")
    assert planned is not None and hub.requests == []
    assert (planned["repository"], planned["type"], planned["new_repository"]) == ("user/mine", "model", "private")
    assert planned["left_out"] == ["checkpoint-2", "training_args.bin"]
    weights = adapter / "adapter_model.safetensors"
    assert planned["files"][weights.name] == weights.stat().st_size
    assert planned["bytes"] == sum(planned["files"].values())


def test_what_is_planned_is_what_is_uploaded(adapter: Path, tmp_path: Path, hub: Hub) -> None:
    """To the byte, for an adapter with another base in its config and a table with a written card."""
    write_pairs(PAIRS, tmp_path / "table")
    for folder, place, more in (
        (adapter, "models/user/mine", {"base_model": "org/base"}),
        (tmp_path / "table", "datasets/user/mine", {}),
    ):
        (folder / ".hidden.json").write_text("{}")
        (folder / "optimizer.safetensors").write_bytes(b"state")
        address = f"hf://{place.removeprefix('models/')}"
        planned = push(folder, address, dry_run=True, **more)
        push(folder, address, **more)
        assert planned is not None
        assert planned["files"] == {name: len(content) for name, content in hub.files[place].items()}
        assert {".hidden.json", "optimizer.safetensors"} <= set(planned["left_out"])


def test_secrets_and_weights_that_are_not_there(adapter: Path, tmp_path: Path, hub: Hub) -> None:
    key = "sk-" + "a" * 20
    for name, text in (
        ("notes.txt", f"key {key}"),
        ("settings.json", '{"a": [{"aws_secret_access_key": "wJalr"}]}'),
        ("x.md", "-----BEGIN OPENSSH PRIVATE KEY-----"),
    ):
        (adapter / name).write_text(text)
        with pytest.raises(AlignError, match=rf"\[hub-content\] .*{name}: holds what looks like a token") as found:
            push(adapter, "hf://user/mine", dry_run=True, base_model="org/base")
        assert key not in str(found.value)
        (adapter / name).unlink()
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AlignError, match=r"adapter_model.safetensors: is no complete safetensors file"):
        push(adapter, "hf://user/mine", dry_run=True, base_model="org/base")
    weights.rename(adapter / "other.safetensors")
    with pytest.raises(AlignError, match=r"\[hub-content\] .*: holds no adapter_model.safetensors"):
        push(adapter, "hf://user/mine", dry_run=True, base_model="org/base")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_text("{}")
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(AlignError, match=r"holds no model-00001-of-00002\.safetensors"):
        push(sharded, "hf://user/mine", dry_run=True)
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "pairs.jsonl").write_text("")
    with pytest.raises(AlignError, match=r"\[hub-content\] .*pairs.jsonl: cannot be read as a table"):
        push(tmp_path / "table", "hf://datasets/user/mine", dry_run=True)
    assert hub.requests == []


def test_an_adapter_is_private_and_names_its_base(adapter: Path, hub: Hub) -> None:
    push(adapter, "hf://user/mine", base_model="org/base")
    assert hub.private == {"models/user/mine": True}
    files = hub.files["models/user/mine"]
    assert not [name for name in files if "checkpoint" in name or name.endswith(".bin")]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert not [name for name, content in files.items() if str(adapter.parent).encode() in content]
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] != "org/base"


def test_tables_get_a_card_that_keeps_them_apart(tmp_path: Path, hub: Hub) -> None:
    write_pairs(PAIRS, tmp_path / "table")
    Dataset.from_list(rows(4)).to_parquet(str(tmp_path / "table" / "dropped.parquet"))
    push(tmp_path / "table", "hf://datasets/user/pairs")
    files = hub.files["datasets/user/pairs"]
    assert hub.private == {"datasets/user/pairs": True}
    card = files["README.md"].decode()
    assert "8 pairs, fingerprint" in card and "4 pairs, fingerprint" in card and "config_name: dropped" in card
    assert files["pairs.parquet"] == (tmp_path / "table" / "pairs.parquet").read_bytes()
    assert not (tmp_path / "table" / "README.md").exists() and str(tmp_path) not in card


def test_a_public_repository_is_not_written_to_unless_asked(adapter: Path, hub: Hub) -> None:
    hub.private["models/user/mine"] = False
    with pytest.raises(AlignError, match=r"\[hub-public\] user/mine: found a public repository"):
        push(adapter, "hf://user/mine", base_model="org/base")
    assert hub.files == {}
    push(adapter, "hf://user/mine", base_model="org/base", public=True)
    assert "adapter_model.safetensors" in hub.files["models/user/mine"]


@pytest.mark.parametrize(
    ("address", "options", "message"),
    [
        ("hf://user/mine", {}, r"\[hub-content\].*adapter_config.json: found the local path"),
        ("hf://datasets/user/mine", {}, r"\[hub-address\].*found a model in .*, expected hf://user/mine"),
        ("hf://mine", {}, r"\[hub-address\] hf://mine: expected hf://user/name"),
        ("hf://user/../x", {}, r"\[hub-address\]"),
        ("hf://user/mine", {"base_model": "/a/b c"}, r"\[hub-address\] --base-model"),
        ("s3://bucket/x", {"dry_run": True}, r"\[hub-address\].*found --dry-run"),
    ],
)
def test_what_is_refused_before_the_network(
    address: str, options: dict[str, Any], message: str, adapter: Path, hub: Hub
) -> None:
    with pytest.raises(AlignError, match=message):
        push(adapter, address, **options)
    assert hub.requests == []


def test_a_folder_without_a_model_names_those_inside(adapter: Path, hub: Hub) -> None:
    with pytest.raises(AlignError, match=r"(?s)\[hub-content\].*push one of .*adapter"):
        push(adapter.parent, "hf://user/mine")
    assert hub.requests == []


def test_errors_of_the_hub_show_no_token(adapter: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status = 507
    with pytest.raises(AlignError, match=r"\[hub-away\] user/mine: the hub failed") as full:
        push(adapter, "hf://user/mine", base_model="org/base")
    monkeypatch.setenv("HF_TOKEN", "hf_WrongTokenWrongTokenWrong")
    with pytest.raises(AlignError, match=r"\[hub-refused\]") as refused:
        push(adapter, "hf://user/other", base_model="org/base")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AlignError, match=r"\[hub-away\].*cannot be reached"):
        push(adapter, "hf://user/other", base_model="org/base")
    assert "hf_" not in str(full.value) and "hf_" not in str(refused.value)


def test_the_command_line_with_hf_endpoint(adapter: Path, hub: Hub) -> None:
    command = [sys.executable, "-m", "align.cli", "push", str(adapter), "hf://user/cli", "--base-model", "org/base"]
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "files in user/cli (private)" in done.stderr and TOKEN not in done.stderr + done.stdout
    assert "adapter_model.safetensors" in hub.files["models/user/cli"]


def test_push_to_hub_of_a_trainer(tiny_policy: Path, tmp_path: Path, hub: Hub) -> None:
    """trl's call, a private repository, the true card and the trained weights."""
    args = PreferenceConfig(
        str(tmp_path / "out"), loss="madpo", max_steps=1, per_device_train_batch_size=4, use_cpu=True, bf16=False,
        hub_model_id="user/python", report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = PreferenceTrainer(str(tiny_policy), args=args, train_dataset=PAIRS)
    trainer.train()
    assert hub.requests == []
    trainer.push_to_hub()
    files = hub.files["models/user/python"]
    assert hub.private == {"models/user/python": True}
    card = files["README.md"].decode()
    assert "`madpo`" in card and "| steps | 1 |" in card and str(tmp_path) not in card
    (tmp_path / "copy.safetensors").write_bytes(files["model.safetensors"])
    trained = load_file(tmp_path / "copy.safetensors")
    assert all(value.equal(trained[name]) for name, value in trainer.model.state_dict().items() if name in trained)
