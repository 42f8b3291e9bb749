"""Drawing the next token of every row so that neither the batch nor the padding can change what is drawn.

A draw from softmax(scores) is the argmax of scores + Gumbel noise. The noise comes from one generator per row. What is
left to differ between batches is rounding in the logits, which matters only where it decides which token wins: two
candidates closer than ``TOLERANCE``, or a winner on the border of the nucleus. Such a row is computed again alone and
without padding, which is the same computation in every batch. Two candidates are that close with probability at most
``TOLERANCE`` / temperature: sum over tokens of p (1 - p), times it, to first order.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from transformers import LogitsProcessor

from align.generation.types import Sampling

TOLERANCE = 1e-3
"""Of logits; twice the rounding between batches that cannot turn a choice. Meant to be ample in float32; in half
precision rounding may be more, so that there equal completions are likely and not certain."""


class DrawnToken(LogitsProcessor):
    """Leaves, of each row's scores, only the drawn token finite.

    Args:
        sampling: temperature and top-p.
        seeds: seed of each row [B].
        starts: where each row begins [B]: the number of its padding tokens on the left.
        stops: tokens after which a row is finished.
        alone: logits [V] after one unpadded row of token ids.
        device: of the scores; the same seeds draw other tokens on another kind of device.
    """

    def __init__(
        self,
        sampling: Sampling,
        seeds: Sequence[int],
        starts: Sequence[int],
        stops: Collection[int],
        alone: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        self.starts = starts
        self.stops = torch.tensor(sorted(stops), device=device, dtype=torch.long)
        self.alone = alone
        self.finished = torch.zeros(len(seeds), dtype=torch.bool, device=device)
        self.logprobs: list[torch.Tensor] = []
        """Of the drawn tokens [B], a tensor for each step, where ``sampling.logprobs``."""
        self.recomputed = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] that are 0 at the drawn token and -inf elsewhere."""
        logits = scores.float()
        noise = self._noise(logits)
        drawn, sure = draw(logits, noise, self.sampling, tolerance=TOLERANCE)
        for row in (~sure & ~self.finished).nonzero().flatten().tolist():
            logits[row] = self.alone(input_ids[row, self.starts[row] :]).float()
            drawn[row] = draw(logits[row, None], noise[row, None], self.sampling, tolerance=0.0)[0][0]
            self.recomputed += 1
        self.finished |= torch.isin(drawn, self.stops)
        if self.sampling.logprobs:
            self.logprobs.append(torch.log_softmax(logits, dim=-1).gather(1, drawn[:, None])[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)

    def _noise(self, logits: torch.Tensor) -> torch.Tensor:
        """Standard Gumbel noise [B, V], 0 where the choice is greedy; finished rows are left at 0."""
        noise = torch.zeros_like(logits)
        if self.sampling.temperature > 0:
            own = torch.empty(logits.shape[1], dtype=torch.float64, device=logits.device)
            smallest = torch.finfo(own.dtype).tiny
            for row in (~self.finished).nonzero().flatten().tolist():
                own.uniform_(generator=self.generators[row])
                noise[row] = own.neg_().log1p_().neg_().clamp_min_(smallest).log_().neg_()
        return noise


def draw(
    logits: torch.Tensor, noise: torch.Tensor, sampling: Sampling, *, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(drawn token [B], whether it would be drawn from any logits within ``tolerance`` / 2 of these [B]).

    Top-p keeps the most probable tokens up to and including the one with which their mass reaches ``top_p``.

    Args:
        logits: [B, V].
        noise: Gumbel noise [B, V], or zeros.
        sampling: temperature (0 is greedy) and top-p.
        tolerance: largest difference of two logits that rounding may turn round.
    """
    scale = sampling.temperature or 1.0
    scores, slack = logits / scale, tolerance / scale
    inside = torch.ones_like(scores, dtype=torch.bool)
    candidates = scores + noise
    if sampling.top_p < 1 and sampling.temperature > 0:
        narrow, wide = nucleus_floors(scores, (sampling.top_p - slack, sampling.top_p + slack))
        inside = scores >= narrow + slack
        candidates = candidates.masked_fill(scores < wide - slack, -torch.inf)
    best = candidates.topk(2, dim=-1)
    drawn = best.indices[:, 0]
    sure = (best.values[:, 0] - best.values[:, 1] > slack) & inside.gather(1, drawn[:, None])[:, 0]
    return drawn, sure


def nucleus_floors(scores: torch.Tensor, masses: Sequence[float]) -> list[torch.Tensor]:
    """For each mass p, the lowest score [B, 1] in the smallest set of top tokens whose probability is at least p."""
    ordered = scores.sort(dim=-1, descending=True).values
    before = torch.softmax(ordered, dim=-1).cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    counts = [(before < mass).sum(dim=-1, keepdim=True).clamp_min(1) for mass in masses]
    return [ordered.gather(1, count - 1) for count in counts]
