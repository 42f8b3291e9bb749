"""`align eval`: whether an aligned model is better, by how much, and at what KL."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

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
from align.errors import ConfigError

if TYPE_CHECKING:
    from align.commands.evaluation_job import Settings
    from align.generation.types import EngineName

app = typer.Typer(help="Rewards, win rates and KL of policies; accuracy of reward models.", no_args_is_help=True)
Policies = Annotated[list[str], typer.Argument(metavar="POLICY...", help="NAME=FOLDER or FOLDER; may be an adapter.")]
Reference = Annotated[str | None, typer.Option(help="Reference model; default: what the adapters were trained on.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use a fair sample of LIMIT prompts or pairs.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions(LoadingOptions):
    """Prompts, judge and decoding."""

    prompts: Annotated[str, typer.Option(help="Held-out prompts: a file with one `prompt` per row.")]
    output: Annotated[Path, output_folder("Folder to write into; several commands share one page there.")]
    judge: Annotated[
        str | None,
        typer.Option(
            help="A reward model, reward-server:MODEL, yes-no:MODEL, vader; to compare also llm:MODEL, server:MODEL."
        ),
    ] = None
    base_url: Annotated[
        str | None, typer.Option(help="Address of a server: or reward-server: judge, ending in /v1.")
    ] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of a completion.")] = 64
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers.")] = "auto"
    batch_size: Annotated[int, typer.Option(min=1, help="Completions per forward pass.")] = 64
    limit: Limit = None
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens that a reward model or llm: judge reads; default: 1024.")
    ] = None
    seed: Seed = 0
    cluster: Cluster = None
    chat_template_kwargs: TemplateKwargs = None

    def settings(self, *, temperature: float = 1.0, shown: int = 0) -> "Settings":
        """The options as ``align.commands.evaluate`` takes them."""
        from align.commands.evaluation_job import Settings
        from align.config.judging import CHOICES, SERVED
        from align.generation.types import Sampling

        if not self.judge:
            raise ConfigError("--judge: missing; there is no default judge", code="eval-judge", hint=f"name {CHOICES}")
        if self.base_url is not None and not self.judge.startswith(SERVED):
            raise ConfigError(
                f"--base-url: found one with the judge {self.judge}, expected server:MODEL or reward-server:MODEL",
                code="eval-judge",
                hint="leave it out",
            )
        sampling = Sampling(
            self.max_new_tokens, temperature, seed=self.seed, engine=cast("EngineName", self.engine),
            batch_size=self.batch_size,
        )  # fmt: skip
        cluster, options = cluster_section(self.cluster), self.load_options()
        return Settings(
            self.prompts,
            self.output,
            self.judge,
            sampling,
            self.limit,
            shown,
            self.max_length,
            cluster,
            options,
            template_kwargs(self.chat_template_kwargs),
            self.base_url,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """One decoding temperature, and the prompts that the page shows."""

    temperature: Annotated[float, typer.Option(min=0.0, help="Decoding temperature; 0 is greedy.")] = 1.0
    shown: Annotated[int, typer.Option(min=0, help="Number of prompts whose completions the page shows.")] = 100
    independent_seeds: Annotated[
        bool, typer.Option("--independent-seeds", help="Other random numbers for each policy; default: the same.")
    ] = False

    def settings(self, options: EvaluateOptions) -> "Settings":
        """The options of one evaluation, with these."""
        given = options.settings(temperature=self.temperature, shown=self.shown)
        return replace(given, independent_seeds=self.independent_seeds)


@app.command("reward")
@expand_options
def reward(policies: Policies, options: EvaluateOptions, samples: SampleOptions, reference: Reference = None) -> None:
    """Reward of policies on held-out prompts, gain over the reference, KL, gain per sqrt(2 KL), text statistics."""
    from align.commands import evaluate as commands

    commands.reward(policies, reference, samples.settings(options))


@app.command("compare")
@expand_options
def compare(policies: Policies, options: EvaluateOptions, samples: SampleOptions) -> None:
    """Win rates of two or more policies, each pair in both orders, ties count half, length-controlled, intervals."""
    from align.commands.compare import write_comparisons

    write_comparisons(policies, samples.settings(options))


@app.command("frontier")
@expand_options
def frontier(
    policies: Policies,
    options: EvaluateOptions,
    temperature: Annotated[list[float] | None, typer.Option(min=0.0, help="Decoding temperature, repeatable.")] = None,
    checkpoints: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER with checkpoint-<step> folders, repeatable.")
    ] = None,
    reference: Reference = None,
) -> None:
    """Reward against KL over decoding temperatures and over training checkpoints, as one plot."""
    from align.commands import evaluate as commands

    temperatures = temperature or [0.5, 0.75, 1.0]
    commands.frontier(policies, reference, temperatures, checkpoints or [], options.settings())


@app.command("reward-model")
@expand_options
def reward_model(
    pairs: Annotated[str, typer.Argument(help="Pair file, saved dataset or hub id; RewardBench's columns are known.")],
    model: Annotated[str, typer.Option(help="Reward model: folder or hub id.")],
    output: Annotated[Path, output_folder("Folder to write reward_model.json and reward_model.html into.")],
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--text", help="Read plain pairs as messages of a user and an assistant, or joined."),
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="Column mapping, e.g. group=category.")] = None,
    split: Split = "train",
    drop_invalid: Annotated[bool, typer.Option("--drop-invalid", help="Leave invalid rows out.")] = False,
    limit: Limit = None,
    trained_on: Annotated[
        str | None, typer.Option(help="Training pairs of the model, to find the pairs that are unlike them.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")] = 4096,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per text.")] = 1024,
    seed: Seed = 0,
    *,
    loading: LoadingOptions,
) -> None:
    """Pair accuracy by category, calibration, AUC, length bias, out-of-distribution pairs, largest disagreements."""
    from align.commands.evaluate_reward_model import evaluate

    source = pair_source(pairs, column, split).model_copy(update={"drop_invalid": drop_invalid, "limit": limit})
    evaluate(
        source, model, output, chat=chat, batch_tokens=batch_tokens, max_length=max_length, seed=seed,
        trained_on=trained_on, options=loading.load_options(),
    )  # fmt: skip


@app.command("benchmarks")
def benchmarks(
    policies: Annotated[
        list[str],
        typer.Argument(metavar="POLICY...", help="NAME=FOLDER or FOLDER; with --results, NAME=RESULTS of lm_eval."),
    ],
    output: Annotated[Path, output_folder("Folder to write into; several commands share one page there.")],
    task: Annotated[list[str] | None, typer.Option(help="Task or group of lm-evaluation-harness, repeatable.")] = None,
    reference: Reference = None,
    results: Annotated[
        bool, typer.Option("--results", help="Policies and --reference are results files or folders of lm_eval.")
    ] = False,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in the prompt; default: the task's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first LIMIT documents of each task.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask through the models' chat templates.")
    ] = False,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests per forward pass.")] = 8,
) -> None:
    """Benchmark scores before and after training, through lm-evaluation-harness, with paired intervals."""
    from align.commands import benchmarks as commands

    asked = {"--task": task, "--num-fewshot": num_fewshot, "--limit": limit, "--include-path": include_path}
    if results:
        given = [name for name, value in asked.items() if value is not None]
        if given or reference is None:
            problem = f"--results: found {', '.join(given)} as well" if given else "--reference: missing"
            raise ConfigError(
                f"{problem}, expected results of lm_eval alone, those before training as --reference",
                code="benchmark-task",
            )
        commands.read(policies, reference, output)
        return
    settings = commands.Benchmarks(tuple(task or ()), num_fewshot, limit, apply_chat_template, include_path, batch_size)
    commands.measure(policies, reference, settings, output)


@app.command("page")
def page(output: Annotated[Path, typer.Argument(help="Folder of an evaluation.")]) -> None:
    """Render report.html of an evaluation again from its report.json."""
    from align.commands import evaluation_report

    evaluation_report.page(output)
