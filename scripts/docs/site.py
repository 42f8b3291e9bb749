"""Hook of mkdocs: files of the repository that pages link to become part of the site; folders are named, not linked."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)#\s]+)(#[^)\s]*)?\)")
"""A link out of docs/: its text and the path from the root of the repository."""
KEPT = "repository"
"""Folder of the site for such files."""


def on_files(files: Files, config: Any) -> Files:
    """Add every file that a page of docs/ links to outside it; Markdown as text, which a browser shows."""
    wanted = {target for file in files.documentation_pages() for target in _outside(file)}
    for target in sorted(wanted):
        if (ROOT / target).is_file():
            files.append(File.generated(config, _place(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links out of docs/ lead to the files added above."""
    up = "../" * page.file.src_uri.count("/")

    def link(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        if not (ROOT / target).exists() or (ROOT / "docs" / up / target).exists():
            return found[0]
        return f"[{text}]({up}{_place(target)})" if (ROOT / target).is_file() else text

    return OUTSIDE.sub(link, markdown)


def _outside(file: File) -> set[str]:
    text = Path(str(file.abs_src_path)).read_text(encoding="utf-8")
    return {found[2] for found in OUTSIDE.finditer(text)}


def _place(target: str) -> str:
    return f"{KEPT}/{target}.txt" if target.endswith(".md") else f"{KEPT}/{target}"
