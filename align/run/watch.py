"""The held-out pairs and prompts of a run: where they come from, and that none of them is trained on."""

import json
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset

from align.config import EvalPairsSection, EvalSamplesSection, RunConfig
from align.data.messages import split_arguments, with_arguments
from align.data.overlap import shares_prompt, trained_on
from align.data.pairs import read_pairs
from align.data.prompts import load_prompts
from align.data.sampling import fair_sample, report_sample
from align.data.splits import split_by_prompt
from align.errors import ConfigError, DataError
from align.evaluation.while_training import SampledPrompts, SamplesWhileTraining
from align.io.console import log
from align.run.plan import HELD_OUT
from align.training.held_out import HeldOut
from align.training.held_out_settings import BY_SAMPLES, chooses
from align.training.held_out_trainer import Watch
from align.training.settings import launched
from reward_models.named_judges import make_scoring

EVAL = "eval"
"""Folder of the held-out pairs in the stage of that name."""
SHOWN = 3


def check_watch(config: RunConfig) -> None:
    """Refuse an evaluation while training that this run cannot make.

    Raises:
        ConfigError: a rule of ``keep`` without a judge, samples of a sharded model, or a limit on a KL that is not
            measured there.
    """
    train = config.train
    if train is None:
        return
    keep = train.keep
    if keep is not None and keep.rule in BY_SAMPLES and (config.evaluate is None or config.evaluate.scoring is None):
        raise ConfigError(
            f"train.keep.rule: found {keep.rule} and no judge that gives rewards, by which it goes",
            code="eval-config",
            hint="add a section `evaluate` with a `judge` that scores: a reward model, yes-no:MODEL or vader",
        )
    sharded = next((kind for kind in ("FSDP", "DEEPSPEED") if launched(kind)), None)
    if sharded is None:
        return
    wrong = "train.eval_samples" if train.eval_samples is not None else ""
    wrong = "train.keep.kl_at_most" if keep is not None and keep.kl_at_most is not None else wrong
    if wrong:
        raise ConfigError(
            f"{wrong}: found it together with {sharded}, which shards the model over processes: it is neither sampled "
            "nor its KL computed while it trains",
            code="eval-config",
            hint="leave it out, and evaluate checkpoints with `align eval`",
        )


def split_share(pairs: Dataset, section: EvalPairsSection, seed: int) -> tuple[Dataset, Dataset]:
    """(train, held out): the share of the run's own pairs, dealt out by clusters.

    Raises:
        DataError: nothing is left on one side.
    """
    assert section.share is not None
    train, held_out = split_by_prompt(pairs, section.share, seed if section.seed is None else section.seed)
    if not len(train) or not len(held_out):
        raise DataError(
            f"train.eval_pairs.share: {section.share:g} of {len(pairs)} pairs leaves {len(train)} to train on and "
            f"{len(held_out)} held out",
            code="data-too-few",
            hint="give pairs of more prompts, another share, or eval_pairs.path",
        )
    return train, held_out


def without_trained(held_out: Dataset, trained: Dataset, section: EvalPairsSection) -> Dataset:
    """The held-out pairs of a source, none of which is trained on.

    Raises:
        DataError: some are, and ``overlap`` is not ``remove``; or all are.
    """
    found = trained_on(held_out, trained)
    count, names = int(found.sum()), [repr(held_out["id"][k]) for k in np.flatnonzero(found)[:SHOWN].tolist()]
    if count and section.overlap == "refuse":
        raise DataError(
            f"train.eval_pairs: {section.path}: {count} of {len(held_out)} pairs are trained on (by id or by prompt "
            f"and response), the first {', '.join(names)}; expected none",
            code="eval-overlap",
            hint="take them out of the training pairs, or write `overlap: remove` under eval_pairs to leave them out "
            "of the held-out pairs",
        )
    if count == len(held_out):
        raise DataError(
            f"train.eval_pairs: {section.path}: all {count} pairs are trained on",
            code="eval-overlap",
            hint="give pairs that are held out, or eval_pairs.share",
        )
    if count:
        log.warning("train.eval_pairs: %d of %d pairs are trained on as well and were left out: %s%s", count,
                    len(held_out), ", ".join(names), ", ..." if count > SHOWN else "")  # fmt: skip
    left = held_out.select(np.flatnonzero(~found)) if count else held_out
    prompts = int(shares_prompt(left, trained).sum())
    if prompts:
        log.warning("train.eval_pairs: the prompts of %d of %d pairs are trained on, with other responses", prompts,
                    len(left))  # fmt: skip
    return left


def make_watch(config: RunConfig, trained: Dataset) -> Watch | None:
    """What a run measures while a policy trains on ``trained``; None if nothing.

    Raises:
        DataError: too few prompts.
    """
    assert config.train is not None
    train = config.train
    if train.eval_pairs is None and train.eval_samples is None:
        return None
    choose, pairs, sampler = chooses(train), None, None
    if train.eval_pairs is not None:
        pairs = HeldOut.of(read_pairs(config.folder / HELD_OUT / EVAL), seed=config.seed, choose=choose)
    if train.eval_samples is not None:
        prompts = sampled_prompts(train.eval_samples, pairs, trained, seed=config.seed, choose=choose)
        scoring = None if config.evaluate is None else config.evaluate.scoring
        judge = None if scoring is None else partial(make_scoring, scoring)
        sampler = SamplesWhileTraining(train.eval_samples, prompts, judge, config.seed)
    return Watch(pairs, sampler, train.keep, train.early_stopping)


def sampled_prompts(
    section: EvalSamplesSection, pairs: HeldOut | None, trained: Dataset, *, seed: int, choose: bool
) -> SampledPrompts:
    """The prompts to sample for: those of a file that are not trained on, or those of the held-out pairs.

    Args:
        section: how it is sampled.
        pairs: the held-out pairs.
        trained: the pairs that are trained on.
        seed: of the two halves.
        choose: half of them chooses a checkpoint.

    Raises:
        DataError: none is left, or one where two halves are needed.
    """
    if section.prompts is not None:
        asked = _without_trained_prompts(load_prompts(section.prompts, section.chat_template_kwargs), section, trained)
        halves = np.random.default_rng(seed).permutation(len(asked)) % 2 == 0
    else:
        assert pairs is not None
        rows = [with_arguments(row["prompt"], row) for row in pairs.pairs]
        asked, first = _different(rows)
        halves = np.zeros(len(asked), dtype=bool) if pairs.choosing is None else pairs.choosing[first]
    drawn, total = fair_sample(map(_text, asked), section.limit)
    report_sample("train.eval_samples", len(drawn), total, "prompts")
    halves = halves[drawn]
    if choose and (halves.all() or not halves.any()):
        raise DataError(
            f"train.eval_samples: found {len(drawn)} prompts, of which {int(halves.sum())} choose a checkpoint and "
            f"{int((~halves).sum())} report its numbers; expected some for both",
            code="data-too-few",
            hint="give more prompts, or a larger eval_samples.limit",
        )
    return SampledPrompts([asked[k] for k in drawn], halves if choose else None)


def _without_trained_prompts(prompts: list[Any], section: EvalSamplesSection, trained: Dataset) -> list[Any]:
    known = {_text(prompt) for prompt in trained["prompt"]}
    asked, _ = _different(prompts)
    left = [prompt for prompt in asked if _text(split_arguments(prompt)[0]) not in known]
    if len(left) < len(asked):
        count = len(asked) - len(left)
        log.warning("train.eval_samples: %d of %d prompts of %s are trained on and were left out", count, len(asked),
                    section.prompts)  # fmt: skip
    if not left:
        raise DataError(
            f"train.eval_samples: {section.prompts}: all {len(asked)} prompts are trained on",
            code="eval-overlap",
            hint="give prompts that are held out",
        )
    return left


def _different(prompts: list[Any]) -> tuple[list[Any], list[int]]:
    """Each prompt once, and the place of its first occurrence."""
    places: dict[str, int] = {}
    for k, prompt in enumerate(prompts):
        places.setdefault(_text(prompt), k)
    return [prompts[k] for k in places.values()], list(places.values())


def _text(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True)
