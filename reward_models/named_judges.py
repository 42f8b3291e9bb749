"""The judge that a run file or a command names: what it is, whether it can be used, and the object that judges."""

from pathlib import Path
from typing import Any

from align.config import nearest
from align.config.judging import CHOICES, PREFIXES, RULES, JudgeSection
from align.errors import ConfigError
from align.models.folders import check_model_folder, fingerprint_model
from reward_models.judges import Judge
from reward_models.loading import LoadOptions
from reward_models.pairwise_judges import PairwiseJudge, make_pairwise, make_score_judge
from reward_models.score import REWARDS

AnyJudge = Judge | PairwiseJudge
YES_NO_LENGTH = 2048
"""Tokens of one question of a ``yes-no:`` judge, at most."""
OF_A_SERVER = ("base_url", "concurrency", "attempts")
OF_A_REWARD_MODEL = ("trust_remote_code", "text_pair")


def kind_of(name: str) -> str:
    """``rule``, ``reward model``, ``yes-no``, ``llm``, ``server`` or ``reward-server``.

    Raises:
        ConfigError: there is no such judge.
    """
    if name in RULES:
        return "rule"
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return prefix.removesuffix(":")
    if "/" in name or Path(name).is_dir():
        return "reward model"
    raise ConfigError(
        f"judge {name!r} is not known{nearest(name, [*RULES, *PREFIXES])}", code="judge-name", hint=f"name {CHOICES}"
    )


def check_judge(judge: JudgeSection) -> None:
    """Check what can be checked before a judge is loaded.

    Raises:
        ConfigError: there is no such judge, or it has options of another kind.
        ModelError: its folder holds no model of that kind.
    """
    kind = kind_of(judge.name)
    takes = {
        "rule": (), "reward model": ("dtype", "max_length", *OF_A_REWARD_MODEL), "yes-no": ("dtype", "max_length"),
        "llm": ("dtype", "max_length"), "server": OF_A_SERVER, "reward-server": ("max_length", *OF_A_SERVER),
    }[kind]  # fmt: skip
    given = judge.model_dump(exclude_defaults=True).keys() - {"name", "truth"}
    if wrong := sorted(given - {*takes}):
        raise ConfigError(
            f"judge {judge.name}: found {', '.join(wrong)}, expected only options of its kind: "
            f"{', '.join(takes) or 'none'}",
            code="eval-judge",
            hint="leave them out",
        )
    if kind == "reward-server" and Path(model_of(judge.name)).is_dir():
        from reward_models.reward_server import check_served

        check_served(model_of(judge.name))
    elif kind in ("reward model", "reward-server"):
        check_model_folder(model_of(judge.name), rewards=True, head=True)
    elif kind in ("yes-no", "llm"):
        check_model_folder(model_of(judge.name), rewards=False)


def model_of(name: str) -> str:
    """The model in the name of a judge."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def make_named(judge: JudgeSection, cache: Path | None = None) -> AnyJudge:
    """Load the judge.

    Args:
        judge: its name and options.
        cache: file for the answers of a server, from which a stopped evaluation goes on.

    Raises:
        ConfigError, ModelError: see ``check_judge``; or the model cannot be loaded.
    """
    check_judge(judge)
    kind = kind_of(judge.name)
    if kind == "server":
        from reward_models.server_judge import ServerJudge

        return ServerJudge(
            model_of(judge.name), base_url=judge.base_url, concurrency=judge.concurrency, attempts=judge.attempts,
            cache=cache,
        )  # fmt: skip
    if kind == "reward-server":
        from reward_models.reward_server import RewardServerJudge

        return RewardServerJudge(
            model_of(judge.name), base_url=judge.base_url, concurrency=judge.concurrency, attempts=judge.attempts,
            max_length=judge.max_length, cache=cache,
        )  # fmt: skip
    if kind == "llm":
        return make_pairwise(judge.name, judge.max_length, dtype=judge.dtype)
    if kind == "yes-no":
        from reward_models.llm_judges import YesNoJudge

        return YesNoJudge(model_of(judge.name), dtype=judge.dtype, max_length=judge.max_length or YES_NO_LENGTH)
    if kind == "rule":
        return make_score_judge(judge.name)
    options = LoadOptions(judge.dtype, judge.trust_remote_code, judge.text_pair)
    return make_score_judge(judge.name, judge.max_length, options)


def make_scoring(judge: JudgeSection) -> Judge:
    """Load a judge that gives scores.

    Raises:
        ConfigError, ModelError: see ``make_named``; or it compares two responses.
    """
    loaded = make_named(judge)
    if isinstance(loaded, PairwiseJudge):
        raise ConfigError(
            f"judge {judge.name}: only compares two responses, expected one that gives scores",
            code="eval-judge",
            hint="name a reward model, yes-no:MODEL or vader",
        )
    return loaded


def made_from(judge: JudgeSection) -> dict[str, Any]:
    """What the verdicts of a judge depend on, part of a stage key: options, content of the model, revision."""
    kind = kind_of(judge.name)
    anywhere = {"base_url"} if kind == "reward-server" else set()
    inputs = judge.model_dump(exclude={"truth", "concurrency", "attempts", *anywhere}) | {"revision": REWARDS}
    if kind in ("rule", "server"):
        return inputs
    return inputs | {"model": fingerprint_model(model_of(judge.name))}
