"""Options of a filter that do not fit each other; known before any pair is read."""

from align.config import FilterSection
from align.errors import ConfigError
from align.filtering.rules import RULES

NEEDED_RULE = {
    "held_out": "contamination",
    "language": "language",
    "drop_doubtful": "label_noise",
}
"""Options that only a rule reads, and the rule."""


def check_options(settings: FilterSection) -> None:
    """Check that a method and the rules use each option that is given.

    Raises:
        ConfigError: they do not; the message names each problem.
    """
    if wrong := problems(settings):
        raise ConfigError("; ".join(wrong), code="filter-option", hint="see docs/filtering.md")


def problems(settings: FilterSection) -> list[str]:
    """What is wrong with the options, a sentence each."""
    method, models = settings.method, set(settings.quality_scorers) - {"screen"}
    found = {
        "method threshold: needs `minimum`, the lowest importance to keep": method == "threshold"
        and settings.minimum is None,
        f"minimum: found method {method}, expected threshold": method != "threshold" and settings.minimum is not None,
        "keep: found method threshold, which keeps what reaches `minimum`; expected top or greedy": method
        == "threshold"
        and settings.keep is not None,
        f"per_group: found method {method}, expected top": method != "top" and settings.per_group,
        "quality_model: found no scorer that uses it; expected fluency, rubric or yes_no in quality_scorers": not models
        and settings.quality_model is not None,
        f"quality_scorers: {', '.join(sorted(models))}: found no quality_model, expected one": bool(models)
        and settings.quality_model is None,
        "embedding: found embeddings, which replace the model; expected one of the two": settings.embeddings is not None
        and settings.embedding != "encoder",
    }
    found |= {f"skip: no rule {name!r}; rules are {', '.join(RULES)}": name not in RULES for name in settings.skip}
    found |= {
        f"{option}: found the rule {rule} in skip, which alone uses it": bool(getattr(settings, option))
        and rule in settings.skip
        for option, rule in NEEDED_RULE.items()
    }
    return [problem for problem, there in found.items() if there]
