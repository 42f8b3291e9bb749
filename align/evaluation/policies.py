"""The policies of an evaluation: their names, their folders, their reference and their checkpoints."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.errors import ConfigError
from align.io.console import log
from align.io.stage import read_manifest
from align.models.adapter_folders import FIRST_ADAPTER, base_loading, is_quantized
from align.models.folders import adapter_base, is_adapter

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Policy:
    """A named model."""

    name: str
    model: str
    """Folder (an adapter's too) or hub id."""


def parse_policies(items: Sequence[str]) -> list[Policy]:
    """Parse items ``NAME=FOLDER`` or ``FOLDER``; without a name, the policy gets the name of its folder.

    A folder called ``model`` has the name of its parent without ``train-``: ``runs/demo/train-dpo/model`` is ``dpo``.

    Raises:
        ConfigError: a name has other characters than allowed, or is given twice.
    """
    found: list[Policy] = []
    for item in items:
        name, sign, model = item.partition("=")
        if not sign:
            path = Path(item)
            name, model = (path.parent.name if path.name == "model" else path.name).removeprefix("train-"), item
        if not model or not NAME.fullmatch(name) or name == REFERENCE:
            raise ConfigError(
                f"policy {item!r}: expected NAME=FOLDER, the name of letters, digits and _.+- and not {REFERENCE!r}",
                code="eval-policy",
            )
        if any(policy.name == name for policy in found):
            raise ConfigError(f"policy {item!r}: {name!r} is there twice", code="eval-policy", hint="give NAME=FOLDER")
        found.append(Policy(name, model))
    return found


def find_reference(policies: Sequence[Policy], given: str | None) -> Policy:
    """The reference policy: the one given, or else the model that all policies were trained from.

    That model is the base of an adapter, or the adapter that a training started from. A base that was quantized in
    training has to be given.

    Raises:
        ConfigError: no reference is given, and the policies are not adapters trained from the same model.
        ModelError: an adapter's configuration cannot be read.
    """
    quantized = next((policy.model for policy in policies if base_loading(policy.model)), None)
    if given is not None:
        if quantized is not None and not is_quantized(given):
            log.warning("--reference %s is not quantized, but the base that %s was trained on is", given, quantized)
        return Policy(REFERENCE, given)
    bases = {_trained_from(policy.model) for policy in policies}
    if len(bases) == 1 and (base := bases.pop()) is not None:
        if quantized is not None and not is_quantized(base):
            raise ConfigError(
                f"--reference: needed, because {quantized} was trained on {base} in quantized form",
                code="eval-reference",
                hint="save the quantized base with save_pretrained and give that folder; `align run` needs none",
            )
        return Policy(REFERENCE, base)
    raise ConfigError(
        "--reference: needed, because the policies are not adapters of one model",
        code="eval-reference",
        hint="give the model that training started from",
    )


def _trained_from(model: str) -> str | None:
    """The model that an adapter was trained from; None if ``model`` is not an adapter, or its start cannot be found."""
    folder = Path(model)
    if not is_adapter(folder / FIRST_ADAPTER):
        return adapter_base(model)
    for above in list(folder.absolute().parents)[:2]:
        manifest = read_manifest(above)
        start = manifest and manifest["inputs"].get("settings", {}).get("model")
        if start and is_adapter(start):
            return str(start)
    return None


def checkpoints(policy: Policy) -> list[tuple[int, Policy]]:
    """(optimizer step, policy) of each ``checkpoint-<step>`` in the policy's folder, in order.

    Raises:
        ConfigError: the folder has no checkpoint.
    """
    folder = Path(policy.model)
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [(int(m[1]), str(e)) for e in entries if (m := CHECKPOINT.fullmatch(e.name)) and e.is_dir()]
    if not found:
        raise ConfigError(
            f"--checkpoints {policy.name}={folder}: holds no folder checkpoint-<step>",
            code="eval-checkpoints",
            hint="train with `save_strategy: steps` and give the `checkpoints` folder",
        )
    return [(step, Policy(policy.name, path)) for step, path in sorted(found)]
