"""YAML from untrusted files: no tags that build objects, no duplicate keys, no anchors that expand without bound."""

from typing import Any

import yaml

MAX_NODES = 100_000
MAX_DEPTH = 64
MAX_CHARACTERS = 1_000_000


def load_yaml(text: str) -> Any:
    """The value of a YAML document, by ``yaml.safe_load`` after a check of its graph of nodes.

    Raises:
        yaml.YAMLError: not YAML, or a tag that is not plain data.
        ValueError: a duplicate key, an anchor that contains itself, nesting that is too deep, too many values once
            anchors are expanded, or a value that its type cannot hold.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text):,} characters, expected at most {MAX_CHARACTERS:,}")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _count(root, {}, 0)
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"a value that its tag cannot hold ({error})") from None


def _count(node: yaml.Node, known: dict[int, int | None], depth: int) -> int:
    """Number of nodes in the tree of ``node``, anchors expanded; ``known`` holds None for a node being counted."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} (line {node.start_mark.line + 1})")
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise ValueError(f"an anchor that contains itself (line {node.start_mark.line + 1})")
        return found
    known[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node)
        children = [each for pair in node.value for each in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    total = 1 + sum(_count(child, known, depth + 1) for child in children)
    if total > MAX_NODES:
        raise ValueError(f"more than {MAX_NODES:,} values once its anchors are unfolded")
    known[id(node)] = total
    return total


def _refuse_twice(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            name = (key.tag, key.value)
            if name in seen:
                raise ValueError(f"the key {key.value!r} twice (line {key.start_mark.line + 1})")
            seen.add(name)
