"""A script as a user with strict types writes it; `make lint` checks it with mypy, and nothing runs it.

A wrong call has a ``type: ignore`` with its error: mypy reports an ignore that it does not need.
"""

from typing import Any

import pandas as pd
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
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
)
from reward_models import OBJECTIVES, RewardConfig, RewardModel, RewardTrainer


def own_loss(logps: PairLogps, margin: Tensor) -> Tensor:
    """A loss of the user's own."""
    return -margin * (logps.chosen - logps.rejected)


def prepare(frame: pd.DataFrame) -> Dataset:
    """Check and filter pairs."""
    pairs = pairs_from_dataset(frame, columns={"chosen": "preferred"}, near_copies=True)
    diagnose_pairs(pairs)["findings"]
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
