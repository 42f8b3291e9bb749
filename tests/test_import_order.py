"""Imports run down one list of packages, lazy ones included; CONTRIBUTING.md shows the same list."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "scripts", "align.cli", "align.run", "align.api", "align.commands", "align.viewer", "align.reports",
    "align.diagnosis", "align.evaluation", "align.filtering", "reward_models", "align.training", "align.entanglement",
    "align.trust", "align.generation", "align.models", "align.data", "align.sharding", "align.losses", "align.config",
    "align.io", "align.distributed", "align.stats", "align.errors",
)  # fmt: skip
"""A package imports itself and packages after it, never one before it."""
ABOVE_REWARD_MODELS = ("align.run", "align.api", "align.commands", "align.evaluation", "align.filtering")


def modules() -> dict[str, Path]:
    found = {}
    for file in [*ROOT.glob("align/**/*.py"), *ROOT.glob("reward_models/**/*.py"), *ROOT.glob("scripts/**/*.py")]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def place(module: str) -> int | None:
    """Index in ``ORDER`` of the package of a module; None for ``align`` itself."""
    return next((k for k, name in enumerate(ORDER) if module == name or module.startswith(f"{name}.")), None)


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Modules of this project that a module imports anywhere, with the line."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names if name.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield (inner if inner in MODULES else node.module), node.lineno


def test_every_module_has_a_place() -> None:
    assert [module for module in MODULES if module != "align" and place(module) is None] == []


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_down_the_list(package: str) -> None:
    here = ORDER.index(package)
    up = [
        f"{MODULES[module].relative_to(ROOT)}:{line} imports {target}"
        for module in MODULES
        if place(module) == here
        for target, line in imports(module)
        if (there := place(target)) is not None and there < here
    ]
    assert up == []


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: {target for target, _ in imports(module)} - {module} for module in MODULES}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in graph[module]:
                walk(target, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_reward_models_do_not_reach_what_is_above_them() -> None:
    seen: set[str] = set()
    left = [module for module in MODULES if module.split(".")[0] == "reward_models"]
    while left:
        module = left.pop()
        assert not module.startswith(ABOVE_REWARD_MODELS), module
        new = {target for target, _ in imports(module)} - seen
        seen |= new
        left += new


def test_few_modules_at_the_top_and_few_files_of_one_name() -> None:
    assert len(list((ROOT / "align").glob("*.py"))) <= 5
    names = Counter(file.name for file in (ROOT / "align").rglob("*.py") if not file.name.startswith("__"))
    assert [name for name, count in names.items() if count > 2] == []
