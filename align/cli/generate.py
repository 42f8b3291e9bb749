"""`align generate`, `align best-of-n` and `align iterate`: sample, choose, and train on samples in rounds."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from align.cli.options import (
    Cluster,
    LoadingOptions,
    Seed,
    Split,
    TemplateKwargs,
    cluster_section,
    expand_options,
    output_folder,
    pair_source,
    template_kwargs,
)


def generate(
    prompts: Annotated[str, typer.Argument(help="Prompt file (JSONL, CSV, Parquet), saved dataset or hub id.")],
    model: Annotated[str, typer.Option(help="Policy: folder (may be an adapter), hub id, or its name on a server.")],
    output: Annotated[Path, output_folder("Folder to write completions.parquet or .jsonl into.")],
    n: Annotated[int, typer.Option("-n", "--samples", min=1, help="Completions of each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of a completion.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Mass of the nucleus; 1: all tokens.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k most probable tokens; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Least probability relative to the top token.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a completion before it, repeatable.")] = None,
    system_prompt: Annotated[
        str | None, typer.Option(help="First message of prompts without one by the system.")
    ] = None,
    seed: Seed = 0,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Also write token ids and log-probs.")] = False,
    engine: Annotated[str, typer.Option(help="auto, vllm, server or transformers.")] = "auto",
    base_url: Annotated[str | None, typer.Option(help="Address of a server, ending in /v1.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass of the transformers engine.")] = 32,
    option: Annotated[list[str] | None, typer.Option(help="Engine setting: tensor_parallel_size=2.")] = None,
    write: Annotated[str, typer.Option("--format", help="parquet or jsonl.")] = "parquet",
    column: Annotated[list[str] | None, typer.Option(help="Column mapping, e.g. prompt=question.")] = None,
    split: Split = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Use a fair sample of LIMIT prompts.")] = None,
    chat_template_kwargs: TemplateKwargs = None,
    cluster: Cluster = None,
) -> None:
    """Complete every prompt; a stopped run resumes after the prompts that are finished."""
    from align.commands.generate import Format, GenerateSettings, find_completions, generate_completions
    from align.errors import ConfigError
    from align.generation.types import EngineName, Sampling
    from align.io.console import log

    if write not in ("parquet", "jsonl"):
        raise ConfigError(f"--format {write}: expected parquet or jsonl", code="config-option")
    if top_p == 0:
        raise ConfigError("--top-p 0: expected a number above 0", code="config-option", hint="greedy: --temperature 0")
    if stop and not all(stop):
        raise ConfigError("--stop: found an empty text, expected one that ends a completion", code="config-option")
    source = pair_source(prompts, column, split).model_copy(update={"limit": limit})
    settings = GenerateSettings(
        model=model,
        sampling=Sampling(
            max_new_tokens, temperature, top_p, n, seed, logprobs,
            cast(EngineName, engine), batch_size, base_url, parse_options(option), top_k, min_p, tuple(stop or ()),
        ),
        format=cast(Format, write), cluster=cluster_section(cluster),
        chat_template_kwargs=template_kwargs(chat_template_kwargs), system_prompt=system_prompt,
    )  # fmt: skip
    generate_completions(source, settings, output)
    file = find_completions(output)
    log.info("completions: %s; next: align pairs build %s --reward-model MODEL --output pairs", file, file)


@expand_options
def best_of_n(
    completions: Annotated[str, typer.Argument(help="What `align generate -n N` wrote: its folder or file.")],
    output: Annotated[Path, output_folder("Folder to write completions.parquet or .jsonl into.")],
    reward_model: Annotated[str | None, typer.Option(help="Reward model that chooses: folder or hub id.")] = None,
    judge: Annotated[str | None, typer.Option(help="Judge that chooses: vader, or yes-no:MODEL.")] = None,
    gold: Annotated[
        str | None, typer.Option(help="Measures what was chosen, nothing else: vader, yes-no:MODEL or a reward model.")
    ] = None,
    write: Annotated[str, typer.Option("--format", help="parquet or jsonl.")] = "parquet",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens per forward pass.")] = 4096,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens per text.")] = 2048,
    seed: Seed = 0,
    *,
    loading: LoadingOptions,
) -> None:
    """Choose the best completion of each prompt; print the gain and a KL bound of each smaller n (JSON)."""
    import json

    from align.commands.best_of_n import PAGE, BestSettings, choose_best
    from align.commands.generate import METRICS, Format, find_completions
    from align.errors import ConfigError
    from align.io.console import log, out
    from align.io.files import read_json
    from reward_models.loading import DEFAULTS
    from reward_models.scorers import ScorerSpec, parse_scorer

    if write not in ("parquet", "jsonl"):
        raise ConfigError(f"--format {write}: expected parquet or jsonl", code="config-option")
    loaded, limits = loading.load_options(), {"batch_tokens": batch_tokens, "max_length": max_length}
    measures = None if gold is None else parse_scorer(gold, options=loaded, **limits)
    of_gold = judge is not None and measures is not None and measures.reward_model is not None
    settings = BestSettings(
        scorer=ScorerSpec(reward_model, judge, options=DEFAULTS if of_gold else loaded, **limits),
        gold=measures,
        format=cast(Format, write),
        seed=seed,
    )
    choose_best(completions, settings, output)
    out.print_json(json.dumps(read_json(output / METRICS)))
    log.info("the best ones: %s; look at it: open %s", find_completions(output), output / PAGE)


def iterate(
    config: Annotated[Path, typer.Argument(help="YAML file of the rounds, e.g. configs/iterative.yaml.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set rounds=2")] = None,
) -> None:
    """Rounds of generate, pairs build and train; each starts from the policy of the previous round."""
    from align.io.console import log
    from align.run.iterate import iterate as run_rounds
    from align.run.iterate import load_iterate

    loaded = load_iterate(config, overrides)
    log.info("iterate %s: %d rounds from %s, seed %d, writes %s",
             loaded.name, loaded.rounds, loaded.train.model, loaded.seed, loaded.folder)  # fmt: skip
    log.info("the last policy: %s", run_rounds(loaded))


def parse_options(options: list[str] | None) -> dict[str, Any]:
    """Settings by name from ``name=value``, each value read as YAML.

    Raises:
        ConfigError: one is not ``name=value``.
    """
    from align.config import apply_override
    from align.errors import ConfigError

    found: dict[str, Any] = {}
    for option in options or []:
        if not option.partition("=")[1]:
            raise ConfigError(f"--option {option}: expected name=value", code="config-option")
        apply_override(found, option)
    return found
