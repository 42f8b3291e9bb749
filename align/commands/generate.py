"""`align generate`: prompts in, one table of completions out; a stopped run goes on with the prompts that are left."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from align.config import ClusterSection, PairsSection
from align.data.prompts import PromptRow, read_prompts
from align.errors import DataError
from align.generation.engines import EngineName, choose_engine, make_engine
from align.generation.types import SAMPLING, Completion, Sampling, show_tokens
from align.io.console import log
from align.io.files import atomic_write, write_json
from align.io.hashing import digest
from align.io.object_store import is_remote
from align.io.stage import Stage, check_output, run_stage
from align.models.folders import fingerprint_model
from align.sharding.jobs import Work, decode

FINISHED = "finished.jsonl"
"""One line for each finished prompt, while a run is under way."""
STAGE = "generate"
STEM = "completions"
SHARD = 64
"""Prompts that a worker of a cluster is given at a time."""
METRICS = "metrics.json"
Format = Literal["jsonl", "parquet"]


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """What `align generate` is asked for."""

    model: str
    sampling: Sampling
    engine: EngineName = "auto"
    base_url: str | None = None
    batch_size: int = 32
    format: Format = "parquet"
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the engine; see ``make_engine``."""
    cluster: ClusterSection | None = None
    """Whose workers share the prompts; no result depends on it."""


def generate_completions(source: PairsSection, settings: GenerateSettings, output: Path) -> Stage:
    """Write ``completions.parquet`` (or ``.jsonl``) and ``metrics.json`` into ``output``; skipped where up to date.

    One row for each completion: ``id`` of the prompt, ``group`` where the prompts have it, ``sample`` (0 to n - 1),
    ``prompt``, ``completion`` (text, or one assistant message), ``tokens``, ``finish_reason``, and ``token_ids`` and
    ``logprobs`` where log-probs are asked for. Each prompt is kept as soon as it is finished, and a rerun under the
    same settings does not repeat it; its random numbers depend on its id, so the result is that of one run.

    Raises:
        AlignError: the prompts, the model, the engine or an option cannot be used.
    """
    return complete_prompts(read_prompts(source), source.path, settings, output)


def complete_prompts(prompts: list[PromptRow], source: str, settings: GenerateSettings, output: Path) -> Stage:
    """``generate_completions`` of prompts that are read already; ``source`` is said in the log."""
    check_output(output, STAGE)
    chosen, why = choose_engine(settings.engine, base_url=settings.base_url)
    log.info(
        "generate: %d prompts of %s, %d each, by %s on %s (%s), seed %d -> %s",
        len(prompts), source, settings.sampling.n, settings.model, chosen, why, settings.sampling.seed, output,
    )  # fmt: skip
    inputs = {
        "prompts": digest([asdict(prompt) for prompt in prompts]),
        "model": settings.model,
        "content": fingerprint_model(settings.model),
        "engine": chosen,
        "options": settings.options,
        "sampling": asdict(settings.sampling),
        "format": settings.format,
        "revision": SAMPLING,
    }
    if settings.base_url is not None:
        inputs["base_url"] = settings.base_url
    return run_stage(STAGE, output, inputs, lambda folder: _work(prompts, settings, chosen, folder))


def find_completions(given: str | Path) -> str:
    """The table in a folder that ``generate_completions`` wrote; a file or an address stands for itself.

    Raises:
        DataError: the folder holds none.
    """
    path = Path(given)
    if is_remote(str(given)) or not path.is_dir():
        return str(given)
    for suffix in ("parquet", "jsonl"):
        if (path / f"{STEM}.{suffix}").exists():
            return str(path / f"{STEM}.{suffix}")
    raise DataError(
        f"{path}: holds no {STEM}.parquet or {STEM}.jsonl", code="data-missing", hint="run `align generate`"
    )


def as_completion(prompt: Any, text: str) -> Any:
    """A completion in the form of its prompt: text, or one assistant message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _work(prompts: list[PromptRow], settings: GenerateSettings, chosen: EngineName, folder: Path) -> None:
    start = time.monotonic()
    file = folder / FINISHED
    finished = read_finished(file, settings.sampling.n)
    left = [prompt for prompt in prompts if prompt.id not in finished]
    if finished:
        log.info("generate: %d of %d prompts are finished already", len(prompts) - len(left), len(prompts))
    loaded, new_tokens = start, 0
    if left and settings.cluster is not None:
        new_tokens = _on_cluster(left, settings, chosen, file)
        finished = read_finished(file, settings.sampling.n)
    elif left:
        engine = make_engine(
            chosen, settings.model, batch_size=settings.batch_size, base_url=settings.base_url,
            options=settings.options,
        )  # fmt: skip
        loaded = time.monotonic()
        stream = engine.stream([row.prompt for row in left], settings.sampling, [row.id for row in left])
        with file.open("a", encoding="utf-8") as out:
            for index, completions in show_tokens(stream, len(left)):
                finished[left[index].id] = [asdict(completion) for completion in completions]
                new_tokens += sum(len(completion.token_ids) for completion in completions)
                out.write(_line(left[index].id, finished[left[index].id]))
                out.flush()
    done = time.monotonic()
    write_table(list(_rows(prompts, finished, settings)), folder / f"{STEM}.{settings.format}")
    _write_metrics(finished, chosen, new_tokens, loaded - start, done - loaded, folder)
    file.unlink(missing_ok=True)


def _line(prompt: str, completions: list[dict[str, Any]]) -> str:
    return json.dumps({"id": prompt, "completions": completions}, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """Completions of the prompts of a shard, as the lines of ``finished.jsonl``."""

    settings: GenerateSettings
    engine: EngineName

    def start(self) -> Work:
        """Load the engine."""
        settings = self.settings
        engine = make_engine(
            self.engine, settings.model, batch_size=settings.batch_size, base_url=settings.base_url,
            options=settings.options,
        )  # fmt: skip

        def work(rows: Dataset) -> Dataset:
            prompts = [json.loads(prompt) for prompt in rows["prompt"]]
            groups = engine.generate(prompts, settings.sampling, list(rows["id"]))
            lines = [
                _line(name, [asdict(one) for one in group]) for name, group in zip(rows["id"], groups, strict=True)
            ]
            tokens = [sum(len(one.token_ids) for one in group) for group in groups]
            return Dataset.from_dict({"line": lines, "tokens": tokens})

        return work


def _on_cluster(left: list[PromptRow], settings: GenerateSettings, chosen: EngineName, file: Path) -> int:
    """Let the workers of the cluster complete the prompts into ``file``; tokens that they have made."""
    from align.sharding.ray_cluster import map_on_cluster

    assert settings.cluster is not None
    starts = range(0, len(left), SHARD)
    tokens = 0

    def rows(start: int) -> Dataset:
        part = left[start : start + SHARD]
        return Dataset.from_dict({"id": [row.id for row in part], "prompt": [json.dumps(row.prompt) for row in part]})

    with file.open("a", encoding="utf-8") as out:

        def keep(_: int, shard: bytes) -> None:
            nonlocal tokens
            made = decode(shard)
            out.write("".join(made["line"]))
            out.flush()
            tokens += sum(made["tokens"])

        map_on_cluster(GenerateJob(settings, chosen), starts, rows, settings.cluster, keep, what="generating")
    return tokens


def read_finished(file: Path, n: int) -> dict[str, list[dict[str, Any]]]:
    """Completions by prompt id of a run that was stopped; a torn last line is cut off the file.

    Args:
        file: JSONL, one finished prompt a line; missing where the run is new.
        n: completions of a finished prompt.
    """
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
    rows = [json.loads(line) for line in whole.split(b"\n")[:-1]]
    return {row["id"]: row["completions"] for row in rows if len(row["completions"]) == n}


def _rows(
    prompts: list[PromptRow], finished: dict[str, list[dict[str, Any]]], settings: GenerateSettings
) -> Iterator[dict[str, Any]]:
    grouped = any(prompt.group is not None for prompt in prompts)
    for prompt in prompts:
        for sample, found in enumerate(finished[prompt.id]):
            completion = Completion(**found)
            row: dict[str, Any] = {"id": prompt.id} | ({"group": prompt.group} if grouped else {})
            row |= {
                "sample": sample,
                "prompt": prompt.prompt,
                "completion": as_completion(prompt.prompt, completion.text),
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
            if settings.sampling.logprobs:
                row |= {"token_ids": completion.token_ids, "logprobs": completion.logprobs}
            yield row


def write_table(rows: list[dict[str, Any]], file: Path) -> None:
    """Write rows as JSONL where the file is called so, else as Parquet; by way of a temporary file."""
    with atomic_write(file) as temporary:
        if file.suffix == ".jsonl":
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        else:
            pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")


def _write_metrics(
    finished: dict[str, list[dict[str, Any]]],
    engine: str,
    new_tokens: int,
    loading: float,
    generating: float,
    folder: Path,
) -> None:
    completions = [completion for group in finished.values() for completion in group]
    tokens = sum(len(completion["token_ids"]) for completion in completions)
    metrics = {
        "engine": engine,
        "prompts": len(finished),
        "completions": len(completions),
        "tokens": tokens,
        "mean_tokens": tokens / len(completions),
        "stopped_share": sum(one["finish_reason"] == "stop" for one in completions) / len(completions),
        "empty": sum(not one["text"].strip() for one in completions),
        "last_session": {
            "tokens": new_tokens,
            "seconds_loading": loading,
            "seconds_generating": generating,
            "tokens_per_second": new_tokens / generating if new_tokens else None,
        },
    }
    write_json(folder / METRICS, metrics)
    rate = f", {new_tokens / generating:.3g} tokens/s" if new_tokens else ""
    log.info("generate: %d completions of %d prompts, %d tokens%s", len(completions), len(finished), tokens, rate)
