"""Fuzz one target with atheris (coverage-guided mutation of bytes); exits with 77 at the first crash.

    python -m tests.helpers.fuzzing {jsonl,csv,parquet,config,override} FOLDER --seconds 150

A crash is any exception but an ``AlignError``; its input is saved in FOLDER as ``crash-...``. The corpus grows in
FOLDER/corpus.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import atheris
import datasets

from tests.helpers.builders import rows

with atheris.instrument_imports(include=["align"]):
    from tests.config import test_fuzz_config
    from tests.data import test_fuzz_pairs

SUFFIXES = {"jsonl": ".jsonl", "csv": ".csv", "parquet": ".parquet"}
LONGEST = 4096
WORDS = (
    *('"prompt"', '"chosen"', '"rejected"', '"margin"', '"role"', '"content"', '"user"', '"assistant"', "NaN", "1e999"),
    *(
        "\\x00",
        "\\xff\\xfe",
        "\\\\ud800",
        "null",
        "prompt,chosen,rejected",
        '""',
        "[[",
        "{}",
        "&a",
        "*a",
        "<<:",
        "!!python/",
    ),
    *(
        "train:",
        "reward:",
        "pairs:",
        "methods:",
        "loss:",
        "parameters:",
        "output_dir:",
        "---",
        "? ",
        "0x",
        "2020-01-01",
    ),
)
"""Dictionary of the mutations."""
COLUMNS = ("prompt", "chosen", "rejected", "margin")


def seeds(target: str) -> list[bytes]:
    """Valid inputs to start from."""
    table = rows(4)
    if target == "jsonl":
        messages = {side: [{"role": "assistant", "content": f"{side} words"}] for side in ("chosen", "rejected")}
        talk = {"prompt": [{"role": "user", "content": "say"}], **messages}
        return ["".join(json.dumps(row) + "\n" for row in made).encode() for made in (table, [talk])]
    if target == "csv":
        lines = [",".join(COLUMNS), *(",".join(str(row[name]) for name in COLUMNS) for row in table)]
        return ["\n".join(lines).encode(), b'chosen,rejected\n"a b","a c"\n']
    if target == "parquet":
        return [test_fuzz_pairs.parquet_bytes()]
    if target == "config":
        return [test_fuzz_config.dumped(test_fuzz_config.WHOLE).encode()]
    return [b"train.methods.a.parameters.beta=0.2", b"pairs.columns={chosen: good}"]


def run(target: str, folder: Path) -> Callable[[bytes], None]:
    """Function that is called with each input."""
    if target == "config":
        return lambda data: test_fuzz_config.check_config(folder, data)
    if target == "override":
        return lambda data: test_fuzz_config.test_any_override.hypothesis.inner_test(data.decode("utf-8", "replace"))
    return lambda data: test_fuzz_pairs.check_bytes(folder, SUFFIXES[target], data)


def main() -> None:
    """Fuzz until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*SUFFIXES, "config", "override"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=int, default=150)
    options = parser.parse_args()
    corpus = options.folder / "corpus"
    corpus.mkdir(parents=True)
    for number, seed in enumerate(seeds(options.target)):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = options.folder / "words"
    words.write_text("".join('"{}"\n'.format(word.replace('"', '\\"')) for word in WORDS))
    datasets.disable_progress_bars()
    flags = [f"-max_total_time={options.seconds}", f"-max_len={LONGEST}", f"-dict={words}", "-timeout=60"]
    flags += ["-rss_limit_mb=4096", f"-artifact_prefix={options.folder}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], run(options.target, options.folder))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
