"""Pages of docs/reference/ are what the code writes, and every page of docs/ has its place in the site."""

from pathlib import Path

import yaml

from scripts.docs.reference import FOLDER, pages

ROOT = Path(__file__).parents[1]


def test_reference_pages_are_those_of_the_code() -> None:
    written = {file.name: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.md")}
    assert written == pages(), "run make docs"


def test_every_page_is_in_the_navigation() -> None:
    def names(tree: object) -> list[str]:
        if isinstance(tree, str):
            return [tree]
        parts = tree.values() if isinstance(tree, dict) else tree
        return [name for part in parts for name in names(part)]  # type: ignore[attr-defined]

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    there = [str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")]
    assert sorted(names(settings["nav"])) == sorted(there)
