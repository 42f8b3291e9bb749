"""Draw the next token of every row so that neither the batch nor the padding changes the draw.

The argmax of scores + Gumbel noise is a draw from softmax(scores); each row has its own generator for the noise. Logits
still differ between batches by rounding, which matters only if it decides which token wins: if the two best candidates
are closer than ``TOLERANCE``, or the winner is on the border of a cut (top-p, top-k, min-p). The logits of such a row
are computed again without the batch and without padding. To first order two candidates are that close with probability
``TOLERANCE`` / temperature times the sum over tokens of p (1 - p).

Shapes: B rows, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from transformers import LogitsProcessor

from align.generation.types import Sampling

TOLERANCE = 1e-3
"""Logit tolerance: twice the largest rounding error between batches that cannot change a draw. It is ample in float32;
in half precision rounding errors may be larger, so that equal completions are likely but not certain."""


class DrawnToken(LogitsProcessor):
    """Draw a token for each row and set the scores of all others to -inf.

    Args:
        sampling: temperature and truncation.
        seeds: seed of each row [B].
        starts: number of padding tokens on the left of each row [B].
        stops: tokens after which a row is finished.
        alone: returns the logits [V] after one row of token ids without padding.
        device: device of the scores; on another kind of device the same seeds draw other tokens.
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
        """Log-probs of the drawn tokens, [B] for each step; empty without ``sampling.logprobs``."""
        self.recomputed = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V]: 0 at the drawn token, -inf elsewhere."""
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
        """Standard Gumbel noise [B, V]; 0 for greedy decoding and for finished rows."""
        noise = torch.zeros_like(logits)
        if self.sampling.temperature > 0:
            uniform = torch.empty(logits.shape[1], dtype=torch.float64, device=logits.device)
            smallest = torch.finfo(uniform.dtype).tiny
            for row in (~self.finished).nonzero().flatten().tolist():
                uniform.uniform_(generator=self.generators[row])
                noise[row] = uniform.neg_().log1p_().neg_().clamp_min_(smallest).log_().neg_()
        return noise


def draw(
    logits: torch.Tensor, noise: torch.Tensor, sampling: Sampling, *, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (drawn token [B], whether any logits within ``tolerance`` / 2 of these give the same draw [B]).

    Args:
        logits: [B, V].
        noise: Gumbel noise [B, V], or zeros.
        sampling: temperature (0 is greedy) and truncation.
        tolerance: largest difference of two logits whose order rounding may reverse.
    """
    scale = sampling.temperature or 1.0
    scores, slack = logits / scale, tolerance / scale
    inside = torch.ones_like(scores, dtype=torch.bool)
    candidates = scores + noise
    cuts = sampling.truncation
    if cuts.cuts and sampling.temperature > 0:
        inside = scores >= cuts.floor(scores, slack)
        candidates = candidates.masked_fill(scores < cuts.floor(scores, -slack), -torch.inf)
    best = candidates.topk(2, dim=-1)
    drawn = best.indices[:, 0]
    sure = (best.values[:, 0] - best.values[:, 1] > slack) & inside.gather(1, drawn[:, None])[:, 0]
    return drawn, sure
