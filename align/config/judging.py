"""Judges in a run file, by name."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from align.config.base import Count, Section

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
RULES = ("vader",)
"""Judges by rule."""
SERVED = ("server:", "reward-server:")
"""Kinds of judges that are a model behind a server."""
PREFIXES = ("yes-no:", "llm:", *SERVED)
"""Kinds of judges that are a language model; its folder, hub id or served name follows."""
CHOICES = (
    "the folder or hub id of a reward model, yes-no:MODEL (a language model says of each response whether it is good), "
    "llm:MODEL (a language model compares two responses), server:MODEL (the same by an OpenAI-compatible server), "
    "reward-server:MODEL (a reward model that a vLLM server computes), or vader (a sentiment lexicon: only where the "
    "wish is a friendly text)"
)


class JudgeSection(Section):
    """One judge of the policies. `judge: NAME` stands for `judge: {name: NAME}`."""

    name: str
    """The folder or hub id of a reward model, ``yes-no:MODEL``, ``llm:MODEL``, ``server:MODEL``,
    ``reward-server:MODEL`` or ``vader``."""
    truth: bool = False
    """This judge is the truth that is aimed at: the report then calls its rewards gold."""
    dtype: Dtype = "float32"
    """Dtype of the weights of a reward model (its head is always in float32) or of a local language model; ``auto`` is
    the checkpoint's."""
    max_length: Count | None = None
    """Tokens that a reward model or an ``llm:`` judge reads; default: 1024."""
    trust_remote_code: bool = False
    """Code that comes with a reward model may run."""
    text_pair: bool = False
    """A reward model that is an encoder reads prompt and response as a sentence pair."""
    base_url: str | None = None
    """``server:`` and ``reward-server:``: its address, ending in /v1; default: http://localhost:8000/v1."""
    concurrency: Count = 16
    """A server: requests in flight at once."""
    attempts: Count = 6
    """A server: tries for each request."""

    @field_validator("name")
    @classmethod
    def _of_a_known_kind(cls, name: str) -> str:
        if not name or name in PREFIXES:
            raise ValueError(f"found {name!r} without a model, expected {CHOICES}")
        return name

    @property
    def compares(self) -> bool:
        """Whether it compares two responses, and gives no score to one."""
        return self.name.startswith(("llm:", "server:"))


def _as_list(value: Any) -> Any:
    """One judge or several, each a name or a section, as a list of sections."""
    given = value if isinstance(value, list) else [] if value is None else [value]
    return [{"name": one} if isinstance(one, str) else one for one in given]


def _named_once(judges: list[JudgeSection]) -> list[JudgeSection]:
    if not judges:
        raise ValueError(f"missing; there is no default judge: name {CHOICES}")
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise ValueError(f"found a judge twice among {', '.join(names)}")
    if sum(judge.truth for judge in judges) > 1:
        raise ValueError("found `truth: true` for more than one judge")
    return judges


Judges = Annotated[
    list[JudgeSection],
    BeforeValidator(_as_list, json_schema_input_type=str | JudgeSection | list[str | JudgeSection]),
    AfterValidator(_named_once),
    Field(validate_default=True),
]
