"""A learned sparse mask over tokens: the loss sees only the tokens that help to separate chosen from rejected.

Tokens that both responses share cause entanglement and carry no preference (arXiv 2410.13828 proposes a learned sparse
mask against that; no code was published for it). Here the mask has one weight in [0, 1] per entry of the vocabulary,
m = sigmoid(u[token]); the log-ratio of a response is sum_t m_t (log policy(y_t) - log reference(y_t)), and ``sparsity``
times the mean of m over the tokens of a pair is added to its loss. u is learned together with the policy, by Adam.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align.config import TokenMaskSection
from align.losses.pairwise import PairLogps

OPEN = 2.0
"""Initial value of u: every token has the weight sigmoid(2) = 0.88."""
FILE = "token_mask.safetensors"


class TokenMask(nn.Module):
    """The mask and its optimizer.

    Args:
        vocabulary: number of entries of the vocabulary.
        config: sparsity penalty and learning rate.
        accelerator: its processes average the mask's gradient.
    """

    def __init__(self, vocabulary: int, config: TokenMaskSection, accelerator: Accelerator) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((vocabulary,), OPEN, device=accelerator.device))
        self.config = config
        self.accelerator = accelerator
        self.optimizer = torch.optim.Adam([self.logit], lr=config.rate)

    def forward(
        self, policy: Tensor, reference: Tensor, input_ids: Tensor, completion_mask: Tensor
    ) -> tuple[PairLogps, Tensor, Tensor]:
        """Mask the log-probs of B pairs.

        Args:
            policy: log-probs [2B, T - 1] of completion tokens, 0 elsewhere.
            reference: the same under the reference.
            input_ids: [2B, T].
            completion_mask: [2B, T].

        Returns:
            Masked log-probs, the sparsity penalty of each pair [B], and the mean mask weight of each response [2B].
        """
        scored = completion_mask[:, 1:].to(policy.dtype)
        weight = torch.sigmoid(self.logit[input_ids[:, 1:]]) * scored
        length = scored.sum(dim=1)
        sums = [(weight * values).sum(dim=1).chunk(2) for values in (policy, reference)]
        (chosen, rejected), (ref_chosen, ref_rejected) = sums
        mean_weight = weight.sum(dim=1) / length.clamp_min(1)
        masked = PairLogps(chosen, rejected, ref_chosen, ref_rejected, *length.chunk(2))
        weight_w, weight_l = mean_weight.chunk(2)
        return masked, self.config.sparsity * (weight_w + weight_l) / 2, mean_weight.detach()

    def step(self) -> None:
        """Make one step of the mask's own optimizer with the accumulated gradient, averaged over processes."""
        if self.logit.grad is not None:
            self.logit.grad = self.accelerator.reduce(self.logit.grad, "mean")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        """Write the mask and its optimizer's state into a checkpoint."""
        state = self.optimizer.state.get(self.logit, {})
        tensors = {name: torch.as_tensor(value).detach().clone().contiguous() for name, value in state.items()}
        save_file({"logit": self.logit.detach().clone(), **tensors}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote."""
        state = load_file(folder / FILE, device=str(self.logit.device))
        with torch.no_grad():
            self.logit.copy_(state.pop("logit"))
        self.optimizer.state[self.logit] = {**state, **({"step": state["step"].cpu()} if "step" in state else {})}

    def extremes(self, count: int) -> dict[str, list[tuple[int, float]]]:
        """Return the (token id, weight) of the ``count`` smallest and largest weights among those that were trained."""
        weight = torch.sigmoid(self.logit.detach())
        moved = (self.logit.detach() != OPEN).nonzero().flatten().tolist()
        order = sorted(moved, key=lambda token: (float(weight[token]), token))
        pairs = [(token, float(weight[token])) for token in order]
        return {"closed": pairs[:count], "open": pairs[::-1][:count]}
