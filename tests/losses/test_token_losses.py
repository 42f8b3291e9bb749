"""Losses that read tokens: limits, clamps, draws, and that padding and precision change nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.pairwise import dpo
from align.losses.registry import LOSSES, resolve
from align.losses.token_losses import PairTokens, sampled_tokens, tail_weight
from tests.losses.inputs import hand_tokens, with_tokens

READING = [name for name, spec in LOSSES.items() if spec.tokens != "none"]


def random_tokens(pairs: int = 3, width: int = 7, dtype: torch.dtype = torch.float64, **drawn: object) -> tuple:  # type: ignore[type-arg]
    """Random tokens of responses whose lengths differ."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[5, 2, 4][:pairs], [3, 6, 4][:pairs]]).flatten()
    mask = torch.arange(width) < lengths[:, None]

    def numbers() -> Tensor:
        return -torch.rand(2 * pairs, width, generator=generator, dtype=torch.float64).to(dtype) * mask

    return with_tokens(numbers(), numbers(), mask, numbers(), -numbers(), **drawn)


@pytest.mark.parametrize("name", READING)
def test_padding_and_what_stands_outside_of_the_mask_change_nothing(name: str) -> None:
    logps, tokens = random_tokens(rows=(3, 1, 2))
    expected = resolve(name, {})(logps, tokens=tokens)

    def padded(values: Tensor) -> Tensor:
        return F.pad(values, (1, 2), value=-9.0)

    noisy = PairTokens(
        F.pad(tokens.mask, (1, 2)), padded(tokens.logps), padded(tokens.log_sum_squares), padded(tokens.ref_logps),
        padded(tokens.ref_entropy), rows=(3, 1, 2),
    )  # fmt: skip
    assert torch.allclose(resolve(name, {})(logps, tokens=noisy), expected)


@pytest.mark.parametrize("name", READING)
def test_half_precision_is_summed_in_float32(name: str) -> None:
    half_logps, half = random_tokens(dtype=torch.bfloat16)
    parts = [half.mask, *(getattr(half, part).float() for part in ("logps", "log_sum_squares", "ref_logps"))]
    logps, tokens = with_tokens(parts[1], parts[3], half.mask, parts[2], half.ref_entropy.float())
    found, expected = (resolve(name, {})(logps, tokens=each) for each in (half, tokens))
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert half_logps.chosen.dtype == torch.bfloat16


def test_wpo_is_dpo_times_a_weight_without_gradient() -> None:
    """u_w = 0, u_l = -0.5: the weight is e^-0.5; with other squares it would be e^2.5 and is cut at 1."""
    logps, tokens = hand_tokens()
    policy = tokens.logps.clone().requires_grad_()
    tokens = PairTokens(tokens.mask, policy, tokens.log_sum_squares, tokens.ref_logps, tokens.ref_entropy)
    logps, _ = with_tokens(policy, tokens.ref_logps, tokens.mask, policy, policy)  # type: ignore[arg-type]
    found = resolve("wpo", {})(logps, tokens=tokens)
    plain = dpo(logps, beta=0.1)
    assert float(found) == pytest.approx(math.exp(-0.5) * float(plain))
    gradients = [torch.autograd.grad(value, policy, retain_graph=True)[0] for value in (found, plain)]
    assert torch.allclose(gradients[0], math.exp(-0.5) * gradients[1])
    sharp = PairTokens(tokens.mask, policy, tokens.log_sum_squares - 1.5, tokens.ref_logps, tokens.ref_entropy)
    assert float(resolve("wpo", {})(logps, tokens=sharp)) == pytest.approx(float(plain))
    unclamped = resolve("wpo", {"clamp": False})(logps, tokens=sharp)
    assert float(unclamped) == pytest.approx(math.exp(2.5) * float(plain))


def test_mallows_po_counts_certain_prompts_for_more() -> None:
    """At E = e^(-1 / phi) it is DPO; where the reference draws evenly, E = 1, the pair has no gradient."""
    logps, tokens = random_tokens()

    def at(entropy: float) -> Tensor:
        flat = torch.full_like(tokens.logps, entropy)
        given = PairTokens(tokens.mask, tokens.logps, tokens.log_sum_squares, tokens.ref_logps, flat)
        return resolve("mallows_po", {"phi": 0.5})(logps, tokens=given)

    assert torch.allclose(at(math.exp(-2)), dpo(logps, beta=0.1))
    assert torch.allclose(at(1.0), torch.full((3,), math.log(2), dtype=torch.float64))
    assert torch.isfinite(at(0.0)).all()


def test_ld_dpo_between_dpo_and_the_common_length() -> None:
    """ld_alpha 1 is DPO; 0 is DPO on the first min(|y_w|, |y_l|) tokens; between them the log-ratio is linear."""
    logps, tokens = random_tokens()
    assert torch.allclose(resolve("ld_dpo", {"ld_alpha": 1.0})(logps, tokens=tokens), dpo(logps, beta=0.1))
    first = torch.arange(7) < torch.tensor([3, 2, 4, 3, 2, 4])[:, None]
    cut, _ = with_tokens(tokens.logps, tokens.ref_logps, first, tokens.logps, tokens.logps)
    assert torch.allclose(resolve("ld_dpo", {"ld_alpha": 0.0})(logps, tokens=tokens), dpo(cut, beta=0.1))
    half = tokens.weighted(tail_weight(tokens.mask, 0.5)).log_ratio_gap
    assert torch.allclose(half, (logps.log_ratio_gap + cut.log_ratio_gap) / 2)


def test_sampo_draws_as_many_tokens_of_both_anew_in_every_step() -> None:
    """It keeps min(|y_w|, |y_l|) tokens; a pair's draw depends on seed, step and row, not on its batch or place."""
    _, tokens = random_tokens(rows=(7, 8, 9), seed=3, step=2)
    kept = sampled_tokens(tokens)
    assert kept.sum(dim=1).tolist() == [3, 2, 4, 3, 2, 4] and not bool((kept > tokens.mask).any())
    order = torch.tensor([2, 0, 1])
    both = torch.cat([order, order + 3])
    moved = PairTokens(
        tokens.mask[both], tokens.logps[both], tokens.log_sum_squares[both], seed=3, step=2, rows=(9, 7, 8)
    )
    assert torch.equal(sampled_tokens(moved), kept[both])
    draws = set()
    for step in range(20):
        _, other = random_tokens(rows=(7, 8, 9), seed=3, step=step)
        draws.add(tuple(sampled_tokens(other)[0].tolist()))
    assert len(draws) > 3


def test_sampo_of_equal_lengths_is_dpo() -> None:
    mask = torch.ones(4, 5, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    policy, reference = (-torch.rand(4, 5, generator=generator) for _ in range(2))
    logps, tokens = with_tokens(policy, reference, mask, policy, policy)
    assert torch.allclose(resolve("sampo", {})(logps, tokens=tokens), dpo(logps, beta=0.1))


@pytest.mark.parametrize("name", READING)
def test_tokens_are_needed(name: str) -> None:
    logps, _ = hand_tokens()
    with pytest.raises(TypeError, match="reads the tokens"):
        resolve(name, {})(logps)
