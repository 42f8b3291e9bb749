"""Make malformed inputs from a small workspace, and run the command that reads one."""

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file, save_file

from align.run.log import FILE
from tests.helpers.builders import bert_reward, causal, llama_reward, rows, tokenizer

GOOD = {"prompt": "Say:", "chosen": " yes", "rejected": " no"}
RUN = ("run", "run.yaml")
Change = Callable[[Path], object]


@dataclass(frozen=True, slots=True)
class BadInput:
    """One malformed input."""

    what: str
    """Name in docs/errors.md; unique."""
    change: Change
    """Function that makes the input in a copy of the workspace."""
    command: tuple[str, ...]
    code: str
    part: str
    """Part of the message."""


def turn(role: Any, content: Any) -> dict[str, Any]:
    """One message of a conversation."""
    return {"role": role, "content": content}


CHAT = {
    "prompt": [turn("user", "hello")],
    "chosen": [turn("assistant", "hi")],
    "rejected": [turn("assistant", "go away")],
}


def build_workspace(folder: Path) -> None:
    """Write models, pairs, prompts and a run file."""
    causal(folder / "policy")
    bert_reward(folder / "backbone")
    llama_reward(folder / "two-labels", labels=2)
    write_lines(folder / "pairs.jsonl", *rows(8))
    write_lines(folder / "prompts.jsonl", {"prompt": "the film is"}, {"prompt": "a plot is"})
    trainer = {"max_steps": 1, "per_device_train_batch_size": 2, "bf16": False, "gradient_checkpointing": False}
    run = {
        "name": "tiny",
        "pairs": {"path": "pairs.jsonl"},
        "train": {"model": "policy", "methods": {"madpo": {"loss": "madpo"}}, "trainer": trainer},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    make_adapter(folder)


def make_adapter(folder: Path) -> None:
    """Save a LoRA adapter of the policy with its tokenizer in ``folder/adapter``."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "policy")
    base.name_or_path = "policy"
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = "policy"
    adapted.save_pretrained(folder / "adapter")
    tokenizer().save_pretrained(folder / "adapter")


def run_command(command: tuple[str, ...], folder: Path) -> tuple[object, str, str]:
    """(exit code, stdout, stderr) of ``align COMMAND`` run in this process with ``folder`` as its working directory."""
    from align.cli.main import main

    before, arguments = Path.cwd(), sys.argv
    output, errors = io.StringIO(), io.StringIO()
    code: object = None
    try:
        os.chdir(folder)
        sys.argv = ["align", *command]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main()
    except SystemExit as stop:
        code = stop.code
    finally:
        os.chdir(before)
        sys.argv = arguments
    return code, output.getvalue(), errors.getvalue()


def message(errors: str) -> str:
    """The part of stderr from ``error [`` on."""
    return errors[errors.rindex("error [") :].strip() if "error [" in errors else ""


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file of finished stages and reports, without the log, which grows."""
    found = (path for path in folder.rglob("*") if path.is_file() and ".partial" not in str(path))
    files = [path for path in found if path.name != FILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- what goes wrong: each maker returns, or is, a function of the workspace


def write_lines(path: Path, *lines: Any) -> None:
    """Write a JSONL file; a string becomes a line as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def raw(name: str, content: bytes) -> Change:
    """Write a file with these bytes."""
    return lambda folder: (folder / name).write_bytes(content)


def lines(*items: Any) -> Change:
    """Write ``bad.jsonl`` with a good row and these."""
    return lambda folder: write_lines(folder / "bad.jsonl", GOOD, *items)


def parquet(columns: dict[str, Any]) -> Change:
    """Write ``bad.parquet`` with these columns."""
    return lambda folder: pq.write_table(pa.table(columns), folder / "bad.parquet")


def cut(name: str, source: Callable[[Path], Path], keep: float) -> Change:
    """Write as ``name`` the first share ``keep`` of the file that ``source`` makes."""

    def change(folder: Path) -> None:
        content = source(folder).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return change


def good_parquet(folder: Path) -> Path:
    """A valid Parquet file."""
    pq.write_table(pa.table({name: [value] * 500 for name, value in GOOD.items()}), folder / "good.parquet")
    return folder / "good.parquet"


def not_text(folder: Path) -> None:
    """A Parquet file whose strings are not UTF-8."""
    broken = pa.array([b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": ["a"], "chosen": broken, "rejected": ["b"]}), folder / "bad.parquet")


def twice(folder: Path) -> None:
    """A Parquet file with a column twice."""
    columns = [pa.array(["a"])] * 4
    pq.write_table(pa.table(columns, names=["prompt", "chosen", "chosen", "rejected"]), folder / "bad.parquet")


def config(text: str) -> Change:
    """Replace the run file by this text."""
    return lambda folder: (folder / "run.yaml").write_text(text)


def model(change: Callable[[Path], object], source: str = "policy") -> Change:
    """Copy ``source`` to ``bad-model`` and apply ``change`` to it."""

    def apply(folder: Path) -> None:
        shutil.copytree(folder / source, folder / "bad-model")
        change(folder / "bad-model")

    return apply


def remove(*names: str) -> Callable[[Path], object]:
    """Delete files of a folder; names may be patterns."""
    return lambda folder: [path.unlink() for name in names for path in folder.glob(name)]


def edit(name: str, **values: Any) -> Callable[[Path], object]:
    """Set values in a JSON file of a folder."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def pickled(stem: str, name: str) -> Callable[[Path], object]:
    """Save the weights as a pickle instead of safetensors."""

    def change(folder: Path) -> None:
        torch.save(load_file(folder / f"{stem}.safetensors"), folder / name)
        (folder / f"{stem}.safetensors").unlink()

    return change


def more_tokens(folder: Path) -> None:
    """A tokenizer with more tokens than the model embeds."""
    larger = tokenizer()
    larger.add_tokens([f"new{k}" for k in range(50)])
    larger.save_pretrained(folder)


def no_end(folder: Path) -> None:
    """A tokenizer with neither a padding nor an end-of-sequence token."""
    remove("token*", "special*")(folder)
    endless = tokenizer(eos=False)
    endless.pad_token = None
    endless.save_pretrained(folder)


def another_shape(folder: Path) -> None:
    """An adapter trained on a base of another width."""
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.zeros(*(3 * n for n in value.shape)) for name, value in weights.items()},
              folder / "adapter_model.safetensors")  # fmt: skip


def no_template(folder: Path) -> None:
    """A tokenizer without a chat template."""
    remove("chat_template*")(folder)
    tokenizer(template=False).save_pretrained(folder)


def remote_code(folder: Path) -> None:
    """A model type that only code in the folder knows; the code leaves a file if it runs."""
    (folder / "modeling_x.py").write_text("import pathlib\npathlib.Path('EXECUTED').touch()\nX = None\n")
    edit(
        "config.json", model_type="x", auto_map={"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    )(folder)


def deep(levels: int) -> str:
    """JSON nested ``levels`` deep."""
    return '{"prompt":' + "[" * levels + "]" * levels + "}"


def build_and_run(folder: Path) -> Path:
    """Make a workspace with a finished run in ``folder``; returns its path."""
    workspace = folder / "workspace"
    workspace.mkdir()
    build_workspace(workspace)
    code, _, errors = run_command(RUN, workspace)
    assert code == 0, errors
    return workspace
