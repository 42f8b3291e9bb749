"""How completions are sampled in a run."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from align.config.base import Count, Positive, Section
from align.config.judging import Dtype

LATER = ("top_k", "min_p", "stop", "system_prompt", "engine", "base_url", "served_as", "options", "dtype")
"""Keys added after the first release, which are part of a stage key only where they are given."""


class CutsSection(Section):
    """Which tokens a completion is sampled from, where it ends, and how its prompt is written."""

    temperature: Positive = 1.0
    """Divisor of the logits."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling: probability that the tokens sampled from hold together; 1 keeps all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Number of the most probable tokens that are sampled from; 0 keeps all."""
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Smallest probability of a token that is sampled, relative to the most probable one; 0 keeps all."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end a completion, which ends before the first of them."""
    system_prompt: str | None = None
    """First message of all prompts that have no system message of their own; the prompts must be messages."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Arguments of the chat template for all prompts, e.g. {enable_thinking: false}; a prompt's own come first."""


class DecodingSection(CutsSection):
    """What completions are sampled from, and by which engine."""

    prompts: str
    """A file with one ``prompt`` per row, as in ``pairs.path``."""
    max_new_tokens: Count = 24
    """Tokens per completion, at most."""
    batch_size: Count = 64
    """Completions per forward pass of the transformers engine."""
    engine: Literal["auto", "vllm", "server", "transformers"] = "auto"
    """``auto``: the server if ``base_url`` is given, else vLLM if it is installed and there is a GPU, else
    transformers."""
    base_url: str | None = None
    """Address of a server, ending in /v1; not for ``evaluate``, whose policies the run itself trains."""
    served_as: str | None = None
    """Name of the model on the server; default: that of ``train.model``."""
    options: dict[str, Any] = Field(default={})
    """Options that are passed to vLLM or to the server engine, e.g. {tensor_parallel_size: 2}."""
    dtype: Dtype | None = None
    """Dtype of the weights while sampling; default: float32 with transformers, vLLM's own choice with vLLM. In 16 bits
    a completion may depend on the batch."""

    @field_validator("system_prompt")
    @classmethod
    def _not_empty(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("found an empty text, expected a system prompt; leave it out for none")
        return text
