"""A script as a user with strict types writes it; `make lint` checks it with mypy, and nothing runs it.

A wrong call has a ``type: ignore`` with its error: mypy reports an ignore that it does not need.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import align
from align import (
    LOSSES,
    AlignError,
    PairLogps,
    PreferenceConfig,
    PreferenceTrainer,
    advise,
    compare_losses,
    compare_policies,
    diagnose_pairs,
    filter_pairs,
    measure_entanglement,
    measure_influence,
    measure_trust,
    pairs_from_dataset,
    with_checked_pairs,
)
from align.api import Comparison, FilterResult, TrustReport
from align.entanglement.layer_rules import BIAS, LINEAR, RULES
from align.generation.types import Completion, Engine, Sampling
from reward_models import OBJECTIVES, RewardConfig, RewardModel, RewardTrainer


def own_loss(logps: PairLogps, margin: Tensor) -> Tensor:
    """A loss of the user's own."""
    return -margin * (logps.chosen - logps.rejected)


def without_margins(logps: PairLogps) -> Tensor:
    """A loss of the log-probs alone."""
    return -logps.log_ratio_gap


def with_lead(reward_chosen: Tensor, reward_rejected: Tensor, margin: Tensor, *, scale: float = 0.1) -> Tensor:
    """An objective of the user's own."""
    return reward_rejected - reward_chosen + scale * margin


def short_prompt(pairs: Dataset) -> list[int]:
    """A filter score of the user's own."""
    return [-len(prompt.split()) for prompt in pairs["prompt"]]


class Shorter:
    """A judge of the user's own."""

    name = "shorter"

    def score(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        """Shorter is better."""
        return [-float(len(text)) for text in completions]


class Fixed(Engine):
    """An engine of the user's own."""

    name = "fixed"

    def stream(
        self, prompts: Sequence[Any], sampling: Sampling, keys: Sequence[str] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The same text for every prompt."""
        for k in range(len(prompts)):
            yield k, [Completion("good", [1], "stop") for _ in range(sampling.n)]


class MyLinear(nn.Linear):
    """A layer of the user's own."""


RULES.register(MyLinear, weight=LINEAR, bias=BIAS)


def extended(pairs: Dataset, prompts: list[str]) -> list[Any]:
    """Use what is the user's own, and trl's way to write a script."""
    args = PreferenceConfig("out", loss_type=["sigmoid", "bco_pair"], loss_weights=[0.8, 0.2], bf16=False, max_steps=3)
    trainers: list[Any] = [
        PreferenceTrainer("model", None, args, None, pairs, {"near": pairs}, loss=without_margins),
        PreferenceTrainer(Path("model"), train_dataset=pairs.to_list(), loss=lambda logps: -logps.log_ratio_gap),
        PreferenceTrainer("model", train_dataset=pairs, loss=lambda logps, margin: -margin * logps.log_ratio_gap),
        PreferenceTrainer("model", train_dataset=pairs, loss={"terms": {"dpo": 1.0, "nll": 0.5}}),
        RewardTrainer("rm", RewardConfig("rm", objective_kwargs={"scale": 0.5}), None, pairs, objective=with_lead),
    ]
    filtered: FilterResult = filter_pairs(pairs, scores={"short": short_prompt, "size": pairs["margin"]}, rules=["pii"])
    compared: Comparison = compare_policies("out", Fixed(), prompts, judge=Shorter(), n=2)
    trust: TrustReport = measure_trust(pairs, "model", margins="outside")
    return [*trainers, filtered.explain("a")["reason"], compared.interval, trust.decided]


def prepare(frame: pd.DataFrame) -> Dataset:
    """Check and filter pairs."""
    pairs = pairs_from_dataset(frame, columns={"chosen": "preferred"}, near_copies=True)
    diagnose_pairs(pairs)["findings"]
    pairs = with_checked_pairs(pairs, pairs.select(range(2)), share=0.1)
    filtered = filter_pairs(pairs, keep=0.3)
    filtered.write_page("filter.html")
    return filtered.kept


def train(pairs: Dataset) -> str:
    """Train a reward model and a policy."""
    reward = RewardTrainer("rm", args=RewardConfig("rm-out"), train_dataset=pairs, objective="bradley_terry")
    reward.train()
    scorer = RewardModel.from_pretrained("rm-out")
    scores: list[float] = list(scorer.score(["prompt"], ["completion"]))
    args = PreferenceConfig("out", loss="madpo", beta=0.1, loss_kwargs={"tau": 2.0})
    trainer = PreferenceTrainer(
        "model", args=args, train_dataset=scorer.score_pairs(pairs), loss=own_loss, peft_config=LoraConfig(r=4)
    )
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    return f"{scores[0]:.2f} {align.__version__.upper()}"


def look(pairs: Dataset) -> dict[str, Any]:
    """Measure, compare and take advice."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    measure_entanglement(model, tokenizer, pairs)
    measure_influence(model, tokenizer, pairs, pairs)
    compare_losses(model, tokenizer, pairs, losses=["dpo", "madpo"])
    comparison = compare_policies("out", "model", ["prompt"], judge="vader")
    rate: float = comparison.win_rate
    trust = measure_trust(pairs, "model")
    sentences = list(advise(pairs, "model").sentences)
    return trust.loss_kwargs | {"rate": rate, "said": sentences, "known": [*sorted(LOSSES), *sorted(OBJECTIVES)]}


def mistakes(pairs: Dataset) -> Any:
    """Calls that mypy has to refuse."""
    pairs_from_dataset(pairs, colums={"chosen": "preferred"})  # type: ignore[call-arg]
    filter_pairs(pairs, keep="a third")  # type: ignore[arg-type]
    measure_trust(pairs, model=3)  # type: ignore[arg-type]
    RewardModel.from_pretrained("rm", device_map="auto")  # type: ignore[call-arg]
    try:
        advise(pairs, "model", margin="outside")  # type: ignore[call-arg]
    except AlignError as error:
        return error.number  # type: ignore[attr-defined]
    return compare_policies("a", "b", ["prompt"], judge="vader").winrate  # type: ignore[attr-defined]
