"""Choosing and making an engine."""

from typing import Any, Literal, get_args

from align.config import nearest
from align.errors import ConfigError, EnvironmentProblem
from align.generation.types import Engine
from align.generation.vllm_install import import_vllm, vllm_problem
from align.io.console import log

EngineName = Literal["auto", "vllm", "server", "transformers"]


def choose_engine(choice: EngineName, *, base_url: str | None = None) -> tuple[EngineName, str]:
    """(engine that ``choice`` stands for, why): ``auto`` takes the server whose address is given, else vLLM where it is
    installed and there is a GPU, else transformers.

    Raises:
        ConfigError: no such engine, or an address for one that is no server.
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
    options: dict[str, Any] | None = None,
) -> Engine:
    """The engine that ``choice`` stands for, loaded.

    Args:
        choice: see ``choose_engine``; what ``auto`` became and why is logged.
        model: folder (an adapter folder included), hub id, or the name that a server uses.
        batch_size: rows per forward pass of the transformers engine; the others batch by themselves.
        base_url: address of a server, ending in ``/v1``.
        options: keyword arguments of ``vllm.LLM``, of ``ServerEngine`` or of ``from_pretrained``.

    Raises:
        AlignError: the engine or the model cannot be had, or an option is refused.
    """
    chosen, why = choose_engine(choice, base_url=base_url)
    log.info("engine: %s (%s)", chosen, why)
    extra = options or {}
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
    from align.generation.transformers_engine import TransformersEngine
    from align.models.loading import load_merged_policy, load_tokenizer

    policy = load_merged_policy(model, **({"dtype": "float32"} | extra))
    return TransformersEngine(policy, load_tokenizer(model), batch_size=batch_size)
