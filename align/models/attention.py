"""Attention over packed pairs: inside attention, the packed tokens are unpacked into 2B causal rows.

In a decoder layer only attention mixes tokens; everything else works on the packed tokens as they are. Queries, keys
and values of the packed row are copied into ordinary causal rows (the shared prefix twice), the model's own attention
runs on these rows, and each packed token takes the output of its own position. Pairs stay separate rows, so no
attention between pairs is computed or masked, and the kernel is the one that the model uses anyway.

Legend: B pairs, T tokens of the longest sequence, N packed tokens, H heads, D head size.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from align.models.packing import PackedPairs

NAMES = {
    "sdpa": "packed_pairs_sdpa",
    "eager": "packed_pairs_eager",
    "flash_attention_2": "packed_pairs_fa2",
    "flash_attention_3": "packed_pairs_fa3",
}
"""Attention implementation -> name under which the one for packed pairs is registered. No name contains "flash":
transformers would look for a kernel of that name."""
OF_THE_PACKED_ROW = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def enable(model: PreTrainedModel) -> None:
    """Prepare ``model`` for packed pairs; calls without ``packed_pairs`` run its own attention as before.

    Raises:
        ValueError: its attention implementation is not a key of ``NAMES``.
    """
    base = model.config._attn_implementation
    if base in NAMES.values():
        return
    if base not in NAMES:
        raise ValueError(f"attention implementation {base} is not one of {', '.join(NAMES)}")
    name = NAMES[base]
    AttentionInterface.register(name, _attention(base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)


def no_mask(device: torch.device) -> Tensor:
    """A placeholder mask, bool [1, 1, 1, 1]: models pass 4-dimensional masks on, and packed attention makes its own."""
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)


def _attention(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_pairs: PackedPairs | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # Some models pass their eager function as the default of the lookup; it is a name of the model's module.
        run = ALL_ATTENTION_FUNCTIONS.get_interface(base, getattr(_home(module), "eager_attention_forward", None))
        if base.startswith("flash"):  # it reads the name of its kernel from the module's config
            module = _View(module, config=_View(module.config, _attn_implementation=base))  # type: ignore[assignment]
        if packed_pairs is None:
            return run(module, query, key, value, attention_mask, *args, **kwargs)
        for name in OF_THE_PACKED_ROW:
            kwargs.pop(name, None)
        mask = _causal_mask(base, packed_pairs.longest, kwargs.get("sliding_window"), query)
        rows = (_spread(states, packed_pairs.source) for states in (query, key, value))
        output, _ = run(module, *rows, mask, *args, **kwargs)
        return output.flatten(0, 1).index_select(0, packed_pairs.own)[None], None

    return attend


class _View:
    """An object with some attributes replaced; all others are those of the object."""

    def __init__(self, inner: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _inner=inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _home(module: torch.nn.Module) -> Any:
    return sys.modules[type(module).__module__]


def _spread(states: Tensor, source: Tensor) -> Tensor:
    """[1, H, N, D] -> [2B, H, T, D]."""
    _, heads, _, size = states.shape
    rows, longest = source.shape
    tokens = states[0].transpose(0, 1).reshape(-1, heads * size)
    return tokens.index_select(0, source.flatten()).view(rows, longest, heads, size).transpose(1, 2)


def _causal_mask(base: str, longest: int, window: int | None, like: Tensor) -> Tensor | None:
    """Causal mask [1, 1, T, T], or None if the kernel's is_causal flag is enough.

    Right padding needs no mask: a causal model never attends to it.
    """
    narrow = window is not None and window < longest
    if base.startswith("flash") or (base == "sdpa" and not narrow):
        return None
    position = torch.arange(longest, device=like.device)
    back = position[:, None] - position[None, :]
    allowed = (back >= 0) & (back < window if narrow else True)  # type: ignore[operator]
    if base == "sdpa":
        return allowed[None, None]
    return torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, torch.finfo(like.dtype).min)[None, None]
