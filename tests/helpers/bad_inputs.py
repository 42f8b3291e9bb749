"""The table of malformed inputs in docs/errors.md.

python -m tests.helpers.bad_inputs      # writes it again
"""

import shutil
import tempfile
from pathlib import Path

from tests.helpers.bad_input_cases import cases
from tests.helpers.bad_input_makers import BadInput, build_and_run, message, run_command

DOCUMENT = Path(__file__).parents[2] / "docs" / "errors.md"
START, END = "<!-- bad inputs: start -->", "<!-- bad inputs: end -->"


def table(messages: dict[str, str]) -> str:
    """The section of the page, from the message of each case."""
    parts = [START]
    kind = ""
    for group, case in cases():
        if group != kind:
            parts += ["", f"### {group}", "", "| input | message |", "|---|---|"]
            kind = group
        parts.append(row(case, messages[case.what]))
    return "\n".join([*parts, "", END])


def row(case: BadInput, text: str) -> str:
    """The table row of a case and its message."""
    shown = (
        " ".join(text.removeprefix("error ").replace("\n  do: ", "; do: ").split())
        .replace("|", "\\|")
        .replace("`", "'")
    )
    return f"| {case.what} | `{shown}` |"


def main() -> None:
    """Write the table in docs/errors.md again."""
    messages = {}
    with tempfile.TemporaryDirectory() as scratch:
        workspace = build_and_run(Path(scratch))
        for number, (_, case) in enumerate(cases()):
            folder = Path(scratch) / str(number)
            shutil.copytree(workspace, folder)
            case.change(folder)
            messages[case.what] = message(run_command(case.command, folder)[2])
            shutil.rmtree(folder)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text[: text.index(START)], text[text.index(END) + len(END) :]
    DOCUMENT.write_text(before + table(messages) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
