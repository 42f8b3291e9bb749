"""The load-balancing loss of a mixture of experts (Switch Transformer, arXiv 2101.03961, eq. 4 to 6), as trl adds it.

Legend: B pairs, T padded tokens, N tokens of the input, E experts.
"""

from typing import Any

from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from align.errors import ConfigError

NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Where a config says how many experts there are."""


def counts_of(config: Any) -> tuple[int, int] | None:
    """Experts of a layer and those that a token takes; None if the config does not say."""
    text = config.get_text_config()
    found = next((number for name in NUMBERS if (number := getattr(text, name, None))), None)
    taken = getattr(text, "num_experts_per_tok", None)
    return None if found is None or taken is None else (int(found), int(taken))


def balance_loss(router_logits: tuple[Tensor, ...], config: Any, mask: Tensor, source: Tensor | None = None) -> Tensor:
    """E times the sum over experts of (share of tokens sent there) times (mean probability), of all layers.

    Args:
        router_logits: per layer [N, E].
        config: the model's.
        mask: tokens that count, [2B, T].
        source: index of the packed token for each token of the 2B rows, [2B, T]; None: N is 2B * T already. So a
            packed prompt counts for both responses, as it does row by row.

    """
    counts = counts_of(config)
    assert counts is not None  # check_balanced
    rows = router_logits if source is None else tuple(one[source.flatten().to(one.device)] for one in router_logits)
    loss: Tensor = load_balancing_loss_func(rows, *counts, mask)
    return loss


def check_balanced(config: Any, coefficient: float) -> None:
    """Refuse to balance experts of a model whose config does not say how many there are.

    Raises:
        ConfigError: says how to train without.
    """
    if counts_of(config) is None:
        raise ConfigError(
            f"train.trainer.router_aux_loss_coef: found {coefficient:g}, and {type(config).__name__} does not say how "
            "many experts a layer has and a token takes",
            code="trainer-key",
            hint="set it to 0: the experts are not balanced then",
        )
