"""`align generate`: sample completions of prompts into one table; a stopped run resumes with the remaining prompts."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from align.config import ClusterSection, PairsSection
from align.config.columns import TEMPLATE_COLUMNS
from align.data.completions import completion_table
from align.data.messages import argument_cells, split_arguments
from align.data.prompts import PromptRow, read_prompts, rows_with_system
from align.errors import DataError
from align.generation.engines import choose_engine
from align.generation.sampling_job import SamplingJob, completions_of
from align.generation.types import (
    SAMPLING,
    Completion,
    Engine,
    Sampling,
    as_completion,
    keyed_prompts,
    report_broken,
    show_tokens,
)
from align.generation.vllm_adapters import check_vllm_adapter, served_otherwise
from align.io.console import log
from align.io.files import atomic_write, write_json
from align.io.hashing import digest
from align.io.object_store import is_remote
from align.io.parquet import write_parquet
from align.io.stage import Stage, check_output, run_stage
from align.models.chat_template import rendered_today
from align.models.folders import fingerprint_model
from align.models.message_checks import check_prompts_of
from align.models.template_arguments import report_other_arguments
from align.sharding.jobs import decode

FINISHED = "finished.jsonl"
"""One line for each finished prompt; exists while a run is unfinished."""
STAGE = "generate"
STEM = "completions"
SHARD = 64
"""Prompts per shard of a cluster."""
METRICS = "metrics.json"
Format = Literal["jsonl", "parquet"]


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """Settings of `align generate`."""

    model: str
    """Folder (an adapter's too), hub id, or the name that a server uses."""
    sampling: Sampling
    format: Format = "parquet"
    cluster: ClusterSection | None = None
    """The cluster whose workers share the prompts; no result depends on it."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template for all prompts; those of a row come first."""
    system_prompt: str | None = None
    """First message of all prompts that have no system message of their own."""


def generate_completions(source: PairsSection, settings: GenerateSettings, output: Path) -> Stage:
    """Write ``completions.parquet`` (or ``.jsonl``) and ``metrics.json`` into ``output``; skip this if up to date.

    One row for each completion: ``id`` of the prompt, ``group`` if the prompts have it, ``sample`` (0 to n - 1),
    ``prompt``, ``completion`` (text, or one assistant message), ``tools`` and ``chat_template_kwargs`` (JSON) if the
    prompts have them, ``tokens``, ``finish_reason``, the user's own columns of the prompts, and ``token_ids`` and
    ``logprobs`` if log-probs are asked for.
    Each prompt is kept as soon as it is finished, and a rerun with the same settings does not repeat it. The random
    numbers of a prompt depend on its id, so a resumed run gives the same result as an uninterrupted one.

    Raises:
        AlignError: the prompts, the model, the engine or an option cannot be used.
    """
    prompts = read_prompts(source, settings.chat_template_kwargs)
    prompts = rows_with_system(prompts, settings.system_prompt, source.path)
    return complete_prompts(prompts, source.path, settings, output)


def complete_prompts(prompts: list[PromptRow], source: str, settings: GenerateSettings, output: Path) -> Stage:
    """``generate_completions`` for prompts that are already read; the log names ``source``."""
    check_output(output, STAGE)
    sampling = settings.sampling
    chosen, why = choose_engine(sampling.engine, base_url=sampling.base_url)
    if chosen != "server":
        trusted = bool(sampling.options.get("trust_remote_code", False))
        texts = [row.prompt for row in prompts]
        check_prompts_of(texts, [settings.model], trust_remote_code=trusted)
        report_other_arguments(texts, settings.model, trust_remote_code=trusted)
    if chosen == "vllm":
        check_vllm_adapter(settings.model)
    log.info(
        "generate: %d prompts of %s, %d each, by %s on %s (%s), seed %d -> %s",
        len(prompts), source, sampling.n, settings.model, chosen, why, sampling.seed, output,
    )  # fmt: skip
    inputs = {
        "prompts": digest([prompt.made_from for prompt in prompts]),
        "model": settings.model,
        "content": fingerprint_model(settings.model),
        "engine": chosen,
        "options": dict(sampling.options),
        "sampling": sampling.made_from(),
        "format": settings.format,
        "revision": SAMPLING,
    }
    if chosen != "server":
        inputs |= rendered_today(settings.model, lambda: any(not isinstance(row.prompt, str) for row in prompts))
    if sampling.base_url is not None:
        inputs["base_url"] = sampling.base_url
    if chosen == "vllm" and (reason := served_otherwise(settings.model)) is not None:
        inputs["merged"] = reason
    job = SamplingJob(settings.model, replace(sampling, engine=chosen))
    return run_stage(STAGE, output, inputs, lambda folder: _work(prompts, job, settings, folder))


def find_completions(given: str | Path) -> str:
    """The table in a folder that ``generate_completions`` wrote; a file or an address is returned as it is.

    Raises:
        DataError: the folder holds no such table.
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


def _work(prompts: list[PromptRow], job: SamplingJob, settings: GenerateSettings, folder: Path) -> None:
    start = time.monotonic()
    file = folder / FINISHED
    finished = read_finished(file, settings.sampling.n)
    left = [prompt for prompt in prompts if prompt.id not in finished]
    if finished:
        log.info("generate: %d of %d prompts are finished already", len(prompts) - len(left), len(prompts))
    loaded, new_tokens = start, 0
    if left and settings.cluster is not None:
        new_tokens = _on_cluster(left, job, settings.cluster, file)
    elif left:
        engine = job.load()
        loaded = time.monotonic()
        new_tokens = _here(left, engine, settings.sampling, file)
    done = time.monotonic()
    finished = read_finished(file, settings.sampling.n)
    if not finished:
        raise DataError(
            f"none of {len(prompts)} prompts was taken by the engine",
            code="prompt-refused",
            hint="see the messages above; shorten the prompts",
        )
    if len(finished) < len(prompts):
        log.warning("generate: %d of %d prompts are left out", len(prompts) - len(finished), len(prompts))
    write_table(list(_rows(prompts, finished, settings)), folder / f"{STEM}.{settings.format}")
    _write_metrics(finished, job.sampling.engine, new_tokens, loaded - start, done - loaded, folder)
    file.unlink(missing_ok=True)


def _here(left: list[PromptRow], engine: Engine, sampling: Sampling, file: Path) -> int:
    """Append the completions of the prompts to ``file``, each prompt as soon as it is finished; return their tokens."""
    tokens = 0
    stream = engine.stream([row.prompt for row in left], sampling, [row.id for row in left])
    with file.open("a", encoding="utf-8") as out:
        for index, completions in show_tokens(stream, len(left)):
            if not completions:
                continue  # refused, and asked for again when the command is repeated
            out.write(_line(left[index].id, completions))
            out.flush()
            tokens += sum(len(completion.token_ids) for completion in completions)
    return tokens


def _line(prompt: str, completions: list[Completion]) -> str:
    found = [asdict(completion) for completion in completions]
    return json.dumps({"id": prompt, "completions": found}, ensure_ascii=False) + "\n"


def _on_cluster(left: list[PromptRow], job: SamplingJob, cluster: ClusterSection, file: Path) -> int:
    """Append the completions of the prompts, sampled by the cluster's workers, to ``file``; return their tokens."""
    from align.sharding.ray_cluster import map_on_cluster

    tokens = 0

    def part(start: int) -> list[PromptRow]:
        return left[start : start + SHARD]

    def rows(start: int) -> Dataset:
        return keyed_prompts([row.prompt for row in part(start)], [row.id for row in part(start)])

    with file.open("a", encoding="utf-8") as out:

        def keep(start: int, shard: bytes) -> None:
            nonlocal tokens
            for row, completions in zip(part(start), completions_of(decode(shard)), strict=True):
                if not completions:
                    continue  # refused, as in ``_here``
                out.write(_line(row.id, completions))
                tokens += sum(len(completion.token_ids) for completion in completions)
            out.flush()

        map_on_cluster(job, range(0, len(left), SHARD), rows, cluster, keep, what="generating")
    return tokens


def read_finished(file: Path, n: int) -> dict[str, list[dict[str, Any]]]:
    """The finished completions of an unfinished run by prompt id; an incomplete last line is removed from the file.

    Args:
        file: JSONL with one finished prompt per line; it does not exist in a new run.
        n: completions per prompt.
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
    columns = {name for prompt in prompts for name in argument_cells(prompt.prompt)}
    for prompt in prompts:
        cells = argument_cells(prompt.prompt)
        arguments = {name: cells.get(name) for name in TEMPLATE_COLUMNS if name in columns}
        for sample, found in enumerate(finished.get(prompt.id, [])):
            completion = Completion(**found)
            row: dict[str, Any] = {"id": prompt.id} | ({"group": prompt.group} if grouped else {})
            row |= {
                "sample": sample,
                "prompt": split_arguments(prompt.prompt)[0],
                "completion": as_completion(prompt.prompt, completion.text),
                **arguments,
                "tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                **prompt.own,
            }
            if settings.sampling.logprobs:
                row |= {"token_ids": completion.token_ids, "logprobs": completion.logprobs}
            yield row


def write_table(rows: list[dict[str, Any]], file: Path) -> None:
    """Write rows as JSONL if the file is called so, else as Parquet, atomically; a row may lack columns of others."""
    with atomic_write(file) as temporary:
        if file.suffix == ".jsonl":
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            temporary.write_text("".join(lines), encoding="utf-8")
        else:
            write_parquet(completion_table(rows), temporary)


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
        "broken_characters": report_broken((one["text"] for one in completions), "generate"),
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
