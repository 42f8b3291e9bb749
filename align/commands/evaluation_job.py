"""What `align eval reward`, `compare` and `frontier` share: settings, the prompts, the completions, how it was made."""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.commands.evaluation_report import PAGE, REPORT, check_report_folder
from align.commands.evaluation_tables import Written, on_same_prompts, write_completions
from align.config import ClusterSection
from align.data.prompts import draw_prompts
from align.errors import ConfigError
from align.evaluation.policies import Policy
from align.generation.types import Sampling
from align.io.console import log
from reward_models.loading import DEFAULTS, LoadOptions
from reward_models.questions import REWARD_SERVER


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings that every evaluation of policies shares.

    Raises:
        ConfigError: the engine is a server.
    """

    prompts: str
    output: Path
    judge: str
    sampling: Sampling
    """With n = 1."""
    limit: int | None
    """Number of prompts to use; None: all of them."""
    shown: int
    """Number of prompts whose completions are shown on the page."""
    max_length: int | None = None
    """Tokens that a reward model or an ``llm:`` judge reads; None: 1024."""
    cluster: ClusterSection | None = None
    """The cluster whose workers share the prompts; no result depends on it."""
    options: LoadOptions = DEFAULTS
    """How a reward model that judges is loaded and reads texts."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template for all prompts; those of a row come first."""
    base_url: str | None = None
    """Address of a ``server:`` judge."""
    independent_seeds: bool = False
    """Each policy samples with random numbers of its own: the k-th one with the seed plus k, from 0."""

    def __post_init__(self) -> None:
        if self.sampling.engine == "server":
            raise ConfigError(
                "--engine server: found a server, expected auto, vllm or transformers",
                code="engine-option",
                hint="policies are read from their folders here, because KL and checkpoints need their weights",
            )


@dataclass(frozen=True, slots=True)
class Drawn:
    """The prompts of an evaluation, and how many its source has."""

    prompts: list[Any]
    of: int


def draw_for(settings: Settings, policies: Sequence[Policy]) -> Drawn:
    """The prompts, once the chat templates of the policies and of a judge that is a model folder take them.

    Raises:
        ModelError, DataError: the prompts or a template cannot be used.
    """
    from align.models import message_checks, template_arguments

    prompts, total = draw_prompts(settings.prompts, settings.limit, settings.chat_template_kwargs)
    models = dict.fromkeys(policy.model for policy in policies)
    message_checks.check_prompts_of(prompts, models)
    for model in models:
        template_arguments.report_other_arguments(prompts, model)
    scorer = settings.judge.removeprefix(REWARD_SERVER)
    if Path(scorer).is_dir():
        options = {"trust_remote_code": settings.options.trust_remote_code, "text_pair": settings.options.text_pair}
        message_checks.check_prompts_of(prompts, [scorer], answered=True, **options)
    return Drawn(prompts, total)


def write_one(policy: Policy, prompts: Sequence[Any], settings: Settings, temperature: float | None = None) -> Written:
    """The completions of a policy, at the temperature of the settings by default."""
    sampling = settings.sampling if temperature is None else replace(settings.sampling, temperature=temperature)
    return write_completions(policy, prompts, sampling, settings.output, settings.cluster)


def written_by(
    policies: Sequence[Policy], prompts: Sequence[Any], settings: Settings
) -> tuple[dict[str, Written], dict[str, Any]]:
    """Name -> completions of the prompts that every policy completed, and what is left out."""
    written = []
    for number, policy in enumerate(policies):
        seed = settings.sampling.seed + (number if settings.independent_seeds else 0)
        sampling = replace(settings.sampling, seed=seed)
        written.append(write_completions(policy, prompts, sampling, settings.output, settings.cluster))
    kept, left_out = on_same_prompts(written)
    return {one.policy.name: one for one in kept}, left_out


def how_made(
    settings: Settings, policies: Sequence[Policy], drawn: Drawn, started: float, left_out: Mapping[str, Any]
) -> dict[str, Any]:
    """Command, settings and duration of a part of the report."""
    return {
        "command": shlex.join(["align", *sys.argv[1:]]),
        "prompts": str(settings.prompts),
        "n_prompts": len(drawn.prompts) - left_out.get("count", 0),
        **({"left_out": dict(left_out)} if left_out else {}),
        "of_prompts": drawn.of,
        "judge": settings.judge,
        "policies": {policy.name: policy.model for policy in policies},
        "decoding": decoding_of(settings.sampling, independent_seeds=settings.independent_seeds)
        | {"chat_template_kwargs": dict(settings.chat_template_kwargs)},
        "seconds": round(time.monotonic() - started, 1),
    }


def decoding_of(sampling: Sampling, *, independent_seeds: bool) -> dict[str, Any]:
    """How completions were sampled, for a page."""
    return {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        **({"seeds": "independent"} if independent_seeds else {}),
        "batch_size": sampling.batch_size,
        "engine": sampling.engine,
    }


def start(settings: Settings, policies: Sequence[Policy]) -> float:
    """Log what is evaluated and check that the output can be written; return the start time.

    Raises:
        ConfigError: the output is a file, or holds a report or a page of something else.
        DataError: its report.json is not a report.
    """
    check_report_folder(settings.output)
    named = ", ".join(f"{policy.name} ({policy.model})" for policy in policies)
    log.info("evaluating %s on %s, judge %s -> %s", named, settings.prompts, settings.judge, settings.output)
    return time.monotonic()


def finish(output: Path) -> None:
    log.info("numbers: %s; look at it: open %s", output / REPORT, output / PAGE)
