"""The model card of a saved folder: what it is, how it was trained, on what, with which results, how to load it.

The card names no path of the machine: a base model is shown by its id on the hub, or as a local checkpoint.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from align.io.files import write_text
from align.io.secrets import redact_text

FILE = "README.md"
LOCAL = "a local checkpoint"
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")
"""Path of a model in the hub's cache: models--user--name/snapshots/<revision>."""
RESULTS = ("<!-- results -->", "<!-- /results -->")
LOADING = ("<!-- loading -->", "<!-- /loading -->")
NO_RESULTS = "No evaluation of this model was recorded."
Kind = Literal["policy", "reward model"]
POLICY: Kind = "policy"
REWARD_MODEL: Kind = "reward model"
SCORE = """\
from reward_models import RewardModel  # pip install margin-align; it reads texts as the training did

model = RewardModel.from_pretrained(".")  # this folder, or the id of its repository
print(model.score(["How are you?"], [" Fine, thanks."]))"""
LOAD: dict[tuple[Kind, bool], str] = {
    (POLICY, True): """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "."  # this folder, or the id of its repository
model = AutoPeftModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0]))""",
    (POLICY, False): """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the id of its repository
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0]))""",
    (REWARD_MODEL, False): SCORE,
    (REWARD_MODEL, True): SCORE,
}
"""(kind, whether it is an adapter) -> code that loads the folder."""


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """What a card says about a training."""

    kind: Kind
    method: str
    """Name of the loss or objective."""
    summary: str
    """One clause about it."""
    sources: tuple[str, ...]
    """arXiv ids of its papers."""
    parameters: Mapping[str, Any]
    base_model: str
    """Id on the hub, or ``LOCAL``."""
    pairs: int | None
    fingerprint: str | None
    margins: str | None
    """Where the margins come from, see ``TableFacts``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the training: learning rate, steps, seed, adapter."""
    versions: Mapping[str, str] = field(default_factory=dict)


def base_model_id(name: str | None) -> str:
    """Return the hub id of a base model, also of one in the hub's cache; ``LOCAL`` for any other path."""
    if not name:
        return LOCAL
    cached = CACHED.search(name)
    if cached:
        return cached[1].replace("--", "/", 1)
    is_path = Path(name).exists() or name.startswith((".", "~"))
    return name if not is_path and HUB_ID.fullmatch(name) else LOCAL


def papers_of(text: str | None) -> tuple[str, ...]:
    """Return the arXiv ids that the docstring of a loss or objective names, in order."""
    return tuple(dict.fromkeys(ARXIV.findall(text or "")))


def write_card(folder: Path, facts: TrainingFacts, *, adapter: bool) -> None:
    """Write the card of a saved folder, in place of one that peft, trl or another training wrote.

    Results are kept if the card that has them is of the same training.
    """
    text = render(facts, adapter=adapter)
    earlier = (folder / FILE).read_text(encoding="utf-8") if (folder / FILE).is_file() else ""
    if _between(earlier, RESULTS) is not None and _replaced(earlier, RESULTS, NO_RESULTS) == text:
        text = earlier
    write_text(folder / FILE, text)


def add_results(folder: Path, rows: Sequence[tuple[str, str]], note: str) -> None:
    """Put the results of an evaluation into the card of a folder; a card that someone else wrote is left as it is.

    Args:
        folder: a model folder.
        rows: what was measured, and the value with its interval.
        note: a sentence on who measured it, on what.
    """
    file = folder / FILE
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if _between(text, RESULTS) is not None:
        lines = ["| measured | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "", note]
        write_text(file, _replaced(text, RESULTS, "\n".join(lines) if rows else NO_RESULTS))


def copy_as_merged(adapter: Path, folder: Path) -> None:
    """Give a model into which an adapter was merged the adapter's card, with the code that loads the whole model."""
    if not (adapter / FILE).is_file():
        return
    text = (adapter / FILE).read_text(encoding="utf-8")
    if _between(text, LOADING) is not None:
        text = _replaced(text, LOADING, _code(LOAD[POLICY, False]))
        text = text.replace("library_name: peft", "library_name: transformers", 1)
        write_text(
            folder / FILE, text.replace("\nThis folder is an adapter", "\nAn adapter was merged into this model", 1)
        )


def render(facts: TrainingFacts, *, adapter: bool) -> str:
    """Return the text of a card."""
    known = facts.base_model != LOCAL
    head: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation" if facts.kind == POLICY else "text-classification",
        "tags": ["margin-align", facts.method, *(f"arxiv:{number}" for number in facts.sources)],
    }
    if known:
        head = {"base_model": facts.base_model} | head
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if known else LOCAL
    papers = ", ".join(f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in facts.sources)
    what = f"This folder is an adapter of {base}." if adapter else f"It was trained from {base}."
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {facts.kind.capitalize()} trained with {facts.method}",
        what,
        "## Method",
        f"`{facts.method}`: {facts.summary}." + (f" Paper: {papers}." if papers else " It has no paper of its own."),
        _table("parameter", facts.parameters) or "The loss has no parameters.",
        "## Data",
        _data(facts),
        "## Training",
        _table("setting", facts.settings) or "The settings were not recorded.",
        "## Results",
        f"{RESULTS[0]}\n{NO_RESULTS}\n{RESULTS[1]}",
        "## How to load it",
        f"{LOADING[0]}\n{_code(LOAD[facts.kind, adapter])}\n{LOADING[1]}",
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in facts.versions.items()) + ".",
    ]
    if facts.sources:
        lines += ["## Citation", "\n".join(_citation(number) for number in facts.sources)]
    return redact_text("\n\n".join(lines) + "\n")


def _data(facts: TrainingFacts) -> str:
    if facts.pairs is None or facts.fingerprint is None:
        return "The pairs were not counted."
    text = f"{facts.pairs} preference pairs, fingerprint `{facts.fingerprint}` (sha256 of their texts and margins)."
    if facts.margins in (None, "none"):
        return text
    return f"{text} Margins: {facts.margins}."


def _table(kind: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    return "\n".join([f"| {kind} | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())])


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _citation(number: str) -> str:
    return (
        f"```bibtex\n@misc{{arxiv{number.replace('.', '')},\n  eprint = {{{number}}},\n  archivePrefix = {{arXiv}},\n"
        f"  url = {{https://arxiv.org/abs/{number}}}\n}}\n```"
    )


def _between(text: str, marks: tuple[str, str]) -> str | None:
    """What stands between two marks; None if they are missing."""
    _, start, rest = text.partition(marks[0])
    inside, end, _ = rest.partition(marks[1])
    return inside.strip("\n") if start and end else None


def _replaced(text: str, marks: tuple[str, str], new: str) -> str:
    before, start, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    return f"{before}{start}\n{new}\n{end}{after}"
