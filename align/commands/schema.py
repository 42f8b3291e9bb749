"""`align schema`: the JSON Schema of a run file, with the names that the registries and the libraries know."""

import dataclasses
from typing import Any

from align.config import RunConfig, Section, nearest
from align.config.iterate import IterateConfig
from align.config.schema import file_schema
from align.errors import ConfigError

KINDS: dict[str, type[Section]] = {"run": RunConfig, "iterate": IterateConfig}


def schema(kind: str) -> dict[str, Any]:
    """JSON Schema of the YAML of ``align run`` or ``align iterate``.

    Losses and objectives are those of the registries; ``trainer`` and ``peft`` have the fields of the installed trl and
    peft, with the type where it is a simple one.

    Raises:
        ConfigError: ``kind`` is neither ``run`` nor ``iterate``.
    """
    if kind not in KINDS:
        raise ConfigError(f"{kind}: no file of this kind{nearest(kind, list(KINDS))}", code="config-option")
    from peft import LoraConfig
    from trl import DPOConfig, RewardConfig

    from align.losses.registry import ALIASES, LOSSES
    from reward_models.registry import OBJECTIVES

    found = file_schema(KINDS[kind])
    sections = found["$defs"]
    named = {"type": "string", "enum": sorted([*LOSSES, *ALIASES])}
    loss = sections["LossSection"]["properties"]["loss"]
    loss["anyOf"] = [named if one.get("type") == "string" else one for one in loss["anyOf"]]
    fields = {("TrainSection", "trainer"): DPOConfig, ("RewardSection", "trainer"): RewardConfig}
    fields |= {("TrainSection", "peft"): LoraConfig, ("RewardSection", "peft"): LoraConfig}
    for (section, key), library in fields.items():
        if key in sections.get(section, {}).get("properties", {}):
            _add_fields(sections[section]["properties"][key], library)
    if "ObjectiveSection" in sections:
        sections["ObjectiveSection"]["properties"]["name"]["enum"] = sorted(OBJECTIVES)
    return found


def _add_fields(place: dict[str, Any], library: Any) -> None:
    """Give a free mapping the fields of a library's configuration."""
    properties = {one.name: _field(one) for one in dataclasses.fields(library) if one.init}
    free = next((one for one in place.get("anyOf", [place]) if one.get("type") == "object"), place)
    free["properties"], free["additionalProperties"] = properties, False


def _field(field: Any) -> dict[str, Any]:
    """Description of a field, and its type if it is a plain number, string or switch."""
    kinds = {"bool": "boolean", "int": "integer", "float": "number", "str": "string"}
    name = getattr(field.type, "__name__", str(field.type))
    help_text = " ".join(str(field.metadata.get("help", "")).split())
    found: dict[str, Any] = {"description": help_text} if help_text else {}
    if isinstance(field.type, type) and name in kinds:
        found["type"] = kinds[name]
    return found
