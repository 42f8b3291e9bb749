"""Choose and load a sampling engine."""

from collections.abc import Mapping
from typing import Any, get_args

from align.config import nearest
from align.errors import ConfigError, EnvironmentProblem
from align.generation.types import Engine, EngineName
from align.generation.vllm_install import import_vllm, vllm_problem
from align.io.console import log


def choose_engine(choice: EngineName, *, base_url: str | None = None) -> tuple[EngineName, str]:
    """(engine, reason). ``auto`` takes the server if an address is given, else vLLM if it is installed and there is a
    GPU, else transformers.

    Raises:
        ConfigError: no such engine, or an address for an engine that is not a server.
    """
    known = list(get_args(EngineName))
    if choice not in known:
        raise ConfigError(f"engine {choice!r} is not known{nearest(choice, known)}", code="engine-option")
    if base_url is not None and choice not in ("auto", "server"):
        raise ConfigError(f"engine {choice} takes no --base-url", code="engine-option", hint="use --engine server")
    if choice != "auto":
        return choice, "as asked"
    if base_url is not None:
        return "server", "the address of a server is given"
    problem = vllm_problem()
    if problem:
        return "transformers", problem
    import torch

    if not torch.cuda.is_available():
        return "transformers", "vLLM is installed but there is no GPU; --engine vllm uses it on the CPU"
    try:
        import_vllm()
    except EnvironmentProblem as error:
        return "transformers", error.message
    return "vllm", "vLLM is installed and there is a GPU"


def make_engine(
    choice: EngineName,
    model: str,
    *,
    batch_size: int,
    base_url: str | None = None,
    options: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
) -> Engine:
    """Load the engine that ``choice`` stands for.

    Args:
        choice: see ``choose_engine``; what ``auto`` became and why is logged.
        model: folder (an adapter folder included), hub id, or the name that a server uses.
        batch_size: rows per forward pass of the transformers engine; the others batch by themselves.
        base_url: address of a server, ending in ``/v1``.
        options: keyword arguments of ``vllm.LLM``, of ``ServerEngine`` or of ``from_pretrained``.
        tokenizer: folder or hub id of the transformers engine's tokenizer; None: the model's own.

    Raises:
        AlignError: the engine or the model cannot be used, or an option is refused.
    """
    chosen, why = choose_engine(choice, base_url=base_url)
    if choice == "auto":
        log.info("engine: %s (%s)", chosen, why)
    extra = dict(options or {})
    if chosen == "vllm":
        from align.generation.vllm_engine import VllmEngine

        return VllmEngine(model, options=extra)
    if chosen == "server":
        from align.generation.server_engine import ServerEngine

        address = {"base_url": base_url} if base_url is not None else {}
        try:
            return ServerEngine(model, **(address | extra))
        except TypeError as error:
            raise ConfigError(f"engine server: {error}", code="engine-option") from None
    return _load_transformers(model, tokenizer or model, batch_size, extra)


def _load_transformers(model: str, tokenizer: str, batch_size: int, options: dict[str, Any]) -> Engine:
    from align.generation.transformers_engine import TransformersEngine
    from align.models.loading import load_merged_policy, load_tokenizer

    policy = load_merged_policy(model, **({"dtype": "float32"} | options))
    trusted = bool(options.get("trust_remote_code", False))
    return TransformersEngine(policy, load_tokenizer(tokenizer, trust_remote_code=trusted), batch_size=batch_size)
