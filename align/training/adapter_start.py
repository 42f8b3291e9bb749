"""How far a new adapter starts from its reference, the model without it."""

from typing import Any

import torch
from torch import Tensor

from align.errors import ConfigError
from align.io.console import log
from align.models.adapters import starts_from_adapter
from align.models.layout import has_adapter
from align.training.settings import launched

TOKENS = 16
NOTICED, HALF_NOTICED = 1e-4, 0.05
"""Change of a token's log-prob (nats) above which a start is told, in float32 and in 16 bits: above rounding."""


def begin_adapter(model: Any) -> None:
    """Activate the adapter that is trained, if the model has one; try a new one, see ``check_start``."""
    if starts_from_adapter(model):
        model.set_adapter("default")  # train this one; trl's frozen copy of it is the reference
    elif has_adapter(model):
        check_start(model)


def check_start(model: Any) -> None:
    """Run a new adapter on a few random tokens; warn where it does not start at its reference.

    LoRA starts at 0, so that the first loss of DPO is log 2. Kinds that draw their start (FourierFT, VB-LoRA) and
    prompt learning begin away from the reference: their log-ratios, rewards and KL count this distance as well, here
    and in trl. Nothing is run where the weights are spread over processes.

    Args:
        model: the policy with one adapter.

    Raises:
        ConfigError: the model does not run with the adapter, for example because it reads task ids, or gives values
            that are no numbers (DoRA divides by the norm of each row of weights).
    """
    if launched("FSDP") or launched("DEEPSPEED"):
        return
    kind = next(iter(model.peft_config.values())).peft_type
    kind = getattr(kind, "value", kind)
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            with model.disable_adapter():
                reference = _logps(model)
            start = _logps(model)
    except Exception as error:
        raise ConfigError(
            f"train.peft: an adapter of the kind {kind}: the model does not run with it on a prompt and a response "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]})",
            code="adapter",
            hint="use another kind of adapter, such as LoRA",
        ) from error
    finally:
        model.train(was)
    if not bool(start.isfinite().all()):
        raise ConfigError(
            f"train.peft: an adapter of the kind {kind}: with it the model gives log-probs that are no numbers",
            code="adapter",
            hint="leave out use_dora on layers with a row of zeros, such as a head tied to an embedding with padding, "
            "or use another kind of adapter",
        )
    distance = float((start - reference).abs().max())
    if not distance <= (NOTICED if model.get_base_model().dtype == torch.float32 else HALF_NOTICED):
        log.warning(
            "the new adapter (%s) starts %.2g nats a token away from its reference, the model without it: the first "
            "loss is not that of two equal policies, and rewards and KL count this distance as well", kind, distance,
        )  # fmt: skip


def _logps(model: Any) -> Tensor:
    """Log-probs [1, TOKENS, V] of the next tokens after random ones."""
    weight = model.get_base_model().get_input_embeddings().weight
    ids = torch.randint(weight.shape[0], (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(weight.device)
    found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return found[:, -TOKENS:].float().log_softmax(dim=-1)
