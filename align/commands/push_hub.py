"""`align push FOLDER hf://user/name`: upload a model, a reward model or a pair table to the Hugging Face hub.

One commit, so a stopped upload changes nothing. A new repository is private; an existing public one is refused unless
the caller says that it may be public. What only a resumed training reads (checkpoints, pickles) is left out. The plan
of an upload needs no network; ``--dry-run`` prints it and stops.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.errors import ConfigError, DataError, EnvironmentProblem, ModelError
from align.io.console import log
from align.io.secrets import NAMES, SHAPES
from align.models.model_card import HUB_ID, LOCAL, base_model_id

SCHEME, TABLES = "hf://", "datasets/"
CARD, ADAPTER, CONFIG = "README.md", "adapter_config.json", "config.json"
BASE = "base_model_name_or_path"
TABLE_SUFFIXES = (".parquet", ".jsonl", ".csv")
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".md", ".txt", ".model", ".npy", ".py")
CHECKED_SUFFIXES = (".json", ".txt", ".md", ".jinja", ".py")
INDEX = "model.safetensors.index.json"
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", INDEX)
"""Text files of a model that hold no settings."""
PRIVATE_KEY = "PRIVATE KEY-----"
WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
OF_TRAINING = ("optimizer", "scheduler", "rng_state", ".")
"""Beginnings of names of files that belong to a training, or are hidden."""
LEFT_OUT = ("trainer_state.json", "step.json", "loss_state.json", "token_mask.safetensors", "history.json")
"""Files of a checkpoint that only a resumed training reads."""
MEMBERS = "members"
"""Folder of the other members of an ensemble of reward models."""
SUGGESTED = 5
HTTP_CLIENTS = ("httpx", "httpcore")
"""Beginnings of the modules of errors without an answer; huggingface_hub 2 has httpx2, earlier ones httpx."""


@dataclass(frozen=True, slots=True)
class HubUpload:
    """What an upload would change on the hub."""

    folder: Path
    repository: str
    kind: str
    """model or dataset."""
    public: bool
    files: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    written: dict[str, bytes] = field(default_factory=dict)
    """File -> its content on the hub where that differs from the folder's."""

    def describe(self) -> dict[str, Any]:
        """The plan as JSON values: files with their sizes in bytes."""
        names = sorted({*self.files, *self.written})
        sizes = {
            name: len(self.written[name]) if name in self.written else (self.folder / name).stat().st_size
            for name in names
        }
        return {
            "repository": self.repository,
            "type": self.kind,
            "new_repository": "public" if self.public else "private",
            "files": sizes,
            "bytes": sum(sizes.values()),
            "left_out": list(self.left_out),
        }


def is_hub(address: str) -> bool:
    """Whether an address is one of the hub: hf://user/name or hf://datasets/user/name."""
    return address.startswith(SCHEME)


def plan_upload(folder: Path, address: str, *, public: bool = False, base_model: str | None = None) -> HubUpload:
    """Decide what an upload of ``folder`` would contain; no network is used.

    Args:
        folder: a model folder, or a folder with tables of pairs.
        address: hf://user/name for a model, hf://datasets/user/name for tables.
        public: a new repository is public, and an existing public one is allowed.
        base_model: hub id of the model that an adapter belongs to, where the adapter names a local path.

    Raises:
        AlignError: the address is malformed, the folder is of the other kind or of none, an adapter's base is local,
            weights are absent or not complete, a file holds a secret, a table cannot be read.
    """
    repository, kind = _repository(address)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder", code="data-missing", hint="push what a command has written")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    found = "model" if {CONFIG, ADAPTER} & set(names) else "dataset" if any(map(_is_table, names)) else None
    if found is None:
        inside = sorted({str((folder / name).parent) for name in names if name.endswith((f"/{CONFIG}", f"/{ADAPTER}"))})
        raise DataError(
            f"{folder}: found neither a model ({CONFIG} or {ADAPTER}) nor a table of pairs", code="hub-content",
            hint=f"push one of {', '.join(inside[:SUGGESTED])}" if inside else "push what a command has written",
        )  # fmt: skip
    if found != kind:
        expected = f"{SCHEME}{TABLES if found == 'dataset' else ''}{repository}"
        raise ConfigError(f"{address}: found a {found} in {folder}, expected {expected}", code="hub-address")
    chosen = tuple(name for name in names if _wanted(name, kind))
    _check_secrets(folder, chosen)
    left_out = tuple(sorted({name.split("/")[0] for name in names if name not in chosen}))
    if kind == "dataset":
        written = {} if CARD in chosen else {CARD: _table_card(folder, chosen).encode()}
    else:
        _check_weights(folder, chosen)
        written = _with_base(folder, chosen, base_model)
    return HubUpload(folder, repository, kind, public, chosen, left_out, written)


def upload(plan: HubUpload) -> str:
    """Upload what ``plan`` says in one commit; return the address of the commit.

    Raises:
        AlignError: the hub cannot be reached or refuses, or the repository is public and the plan is not.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    with _hub_errors(plan.repository):
        try:
            private = bool(api.repo_info(plan.repository, repo_type=plan.kind).private)
        except RepositoryNotFoundError:
            api.create_repo(plan.repository, repo_type=plan.kind, private=not plan.public)
            private = not plan.public
        if not private and not plan.public:
            raise ConfigError(
                f"{plan.repository}: found a public repository, expected a private one", code="hub-public",
                hint="--public if everybody may read this; or another name",
            )  # fmt: skip
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=plan.written.get(name, str(plan.folder / name)))
            for name in sorted({*plan.files, *plan.written})
        ]
        made = api.create_commit(
            plan.repository, operations, commit_message="Upload with margin-align", repo_type=plan.kind
        )
    log.info("push: %d files in %s (%s)", len(operations), plan.repository, "private" if private else "public")
    return str(made.commit_url)


def _repository(address: str) -> tuple[str, str]:
    """Repository id and kind of an address.

    Raises:
        ConfigError: it is malformed.
    """
    rest = address.removeprefix(SCHEME)
    kind = "dataset" if rest.startswith(TABLES) else "model"
    repository = rest.removeprefix(TABLES)
    if "/" not in repository or not HUB_ID.fullmatch(repository):
        raise ConfigError(
            f"{address}: expected hf://user/name for a model, hf://datasets/user/name for tables", code="hub-address"
        )
    return repository, kind


def _is_table(name: str) -> bool:
    return "/" not in name and name.endswith(TABLE_SUFFIXES)


def _wanted(name: str, kind: str) -> bool:
    """Whether a file belongs to the model or the tables; folders of checkpoints, logs and shards do not."""
    *folders, file = name.split("/")
    if file.startswith(OF_TRAINING):
        return False
    if kind == "dataset":
        return not folders and (_is_table(file) or file == CARD or file.endswith(".json"))
    inside = not folders or (folders[0] == MEMBERS and len(folders) == 2)
    return inside and file.endswith(MODEL_SUFFIXES) and file not in LEFT_OUT


def _check_weights(folder: Path, names: tuple[str, ...]) -> None:
    """Check that the weights that a model folder needs are there and can be opened.

    Raises:
        ModelError: a file is absent, or is no safetensors file, such as one that was not written to its end.
    """
    from safetensors import SafetensorError, safe_open

    needed = {ADAPTER_WEIGHTS} if ADAPTER in names else {WEIGHTS}
    if INDEX in names and ADAPTER not in names:
        needed = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    for name in sorted(needed):
        if name not in names:
            raise ModelError(
                f"{folder}: holds no {name}, without which nobody can load it", code="hub-content",
                hint="save the model again",
            )  # fmt: skip
    for name in names:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="numpy"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{folder / name}: is no complete safetensors file ({error})", code="hub-content",
                    hint="save the model again",
                ) from None  # fmt: skip


def _check_secrets(folder: Path, names: tuple[str, ...]) -> None:
    """Check that no file of settings or notes holds a token, a key or a password.

    Tables are data and are not searched.

    Raises:
        DataError: names the first file that does; the secret itself is not shown.
    """
    for name in names:
        if not name.endswith(CHECKED_SUFFIXES) or name.rsplit("/", 1)[-1] in VOCABULARIES:
            continue
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        if SHAPES.search(text) or PRIVATE_KEY in text or _names_secret(text):
            raise DataError(
                f"{folder / name}: holds what looks like a token, a key or a password, expected none in an upload",
                code="hub-content", hint="remove it from the file, or the file from the folder",
            )  # fmt: skip


def _names_secret(text: str) -> bool:
    """Whether JSON has a key such as ``api_key`` or ``aws_secret_access_key`` with a text as its value."""
    try:
        values = [json.loads(text)]
    except ValueError:
        return False
    while values:
        value = values.pop()
        if isinstance(value, list):
            values += value
        elif isinstance(value, dict):
            values += value.values()
            if any(isinstance(item, str) and item and _of_secret(key.lower()) for key, item in value.items()):
                return True
    return False


def _of_secret(key: str) -> bool:
    return key in NAMES - {"token"} or key.endswith(("api_key", "secret", "password", "access_key", "auth_token"))


def _with_base(folder: Path, names: tuple[str, ...], base_model: str | None) -> dict[str, bytes]:
    """Adapter config and card with the hub id of the base model, where the folder names a local one.

    Raises:
        ConfigError: an adapter's base is a local path, with which nobody else can load it, and no id is given.
    """
    written: dict[str, bytes] = {}
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise ConfigError(f"--base-model {base_model}: expected an id on the hub, user/name", code="hub-address")
    if ADAPTER in names:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        known = base_model_id(config.get(BASE))
        if known == LOCAL and base_model is None:
            raise ConfigError(
                f"{folder / ADAPTER}: found the local path {config.get(BASE)} as the base model, expected an id on the "
                "hub: nobody else could load the adapter",
                code="hub-content", hint="--base-model user/name",
            )  # fmt: skip
        named = base_model if known == LOCAL else known
        if config.get(BASE) != named:
            written[ADAPTER] = (json.dumps(config | {BASE: named}, indent=2) + "\n").encode()
    if base_model is not None and CARD in names:
        text = (folder / CARD).read_text(encoding="utf-8")
        if LOCAL in text and text.startswith("---\n"):
            link = f"[{base_model}](https://huggingface.co/{base_model})"
            text = text.replace(LOCAL, link, 1).replace("---\n", f"---\nbase_model: {base_model}\n", 1)
            written[CARD] = text.encode()
    return written


def _table_card(folder: Path, names: tuple[str, ...]) -> str:
    """The card of tables of pairs: rows, columns, fingerprints, and how to load each of them."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    from align.config.columns import COLUMNS
    from align.data.table_facts import table_facts

    meanings = {column.name: column.meaning for column in COLUMNS}
    readers = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}
    tables = [name for name in names if _is_table(name)]
    head = {
        "tags": ["margin-align", "preference"],
        "configs": [
            {"config_name": Path(name).stem, "data_files": name, **({"default": True} if name == tables[0] else {})}
            for name in tables
        ],
    }
    lines = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", "# Preference pairs"]
    for name in tables:
        reader = readers[Path(name).suffix]
        try:
            table = load_dataset(reader, data_files=str(folder / name), split="train", streaming=False)
        except (ValueError, OSError, StopIteration, DatasetGenerationError) as error:
            raise DataError(
                f"{folder / name}: cannot be read as a table ({' '.join(str(error).split()) or 'no rows'})",
                code="hub-content", hint="remove it, or write it again",
            ) from None  # fmt: skip
        lines.append(f"## {name}")
        if {"chosen", "rejected"} <= set(table.column_names):
            facts = table_facts(table)
            lines.append(f"{facts.pairs} pairs, fingerprint `{facts.fingerprint}`. Margins: {facts.margins}.")
        else:
            lines.append(f"{len(table)} rows.")
        rows = [f"| {column} | {meanings.get(column, 'of the source')} |" for column in table.column_names]
        lines.append("\n".join(["| column | meaning |", "|---|---|", *rows]))
        code = f'load_dataset("{reader}", data_files="{name}", split="train")'
        lines.append(f"```python\nfrom datasets import load_dataset\n\npairs = {code}\n```")
    return "\n\n".join(lines) + "\n"


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Replace an error of the hub by one with a hint.

    Raises:
        EnvironmentProblem: it refuses, is away, or this process is offline.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise EnvironmentProblem(
            f"{repository}: HF_HUB_OFFLINE is set, so nothing is uploaded", code="hub-away", hint="unset it"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = " ".join(str(error).split())
        if status in (401, 403):
            raise EnvironmentProblem(
                f"{repository}: the hub refuses the token, or there is none ({reason})", code="hub-refused",
                hint="`hf auth login` with a token that may write there",
            ) from None  # fmt: skip
        raise EnvironmentProblem(
            f"{repository}: the hub failed ({reason})", code="hub-away", hint="push again; nothing was changed"
        ) from None
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith(HTTP_CLIENTS):
            raise
        raise EnvironmentProblem(
            f"{repository}: the hub cannot be reached ({' '.join(str(error).split())})", code="hub-away",
            hint="check the network and HF_ENDPOINT, then push again",
        ) from None  # fmt: skip
