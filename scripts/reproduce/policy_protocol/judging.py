"""Judge a trained policy on held-out prompts: gold reward and log policy - log reference of each completion."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.commands.evaluation_tables import measure_kl, on_same_prompts, score, write_completions
from align.errors import DataError
from align.evaluation.policies import Policy
from align.generation.types import Sampling
from align.models.loading import load_policy, load_tokenizer
from reward_models.judges import Judge

Decoded = dict[str, dict[str, Any]]
"""Temperature -> reward, kl and number of tokens of one completion per prompt; ``left_out`` counts and names the
prompts that do not fit the policy's window, if there are any, see ``Kept.left_out``."""


def merge_adapter(trained: Path, base: str, target: Path) -> Path:
    """The trained model as a folder with its adapter merged, so that sampling is not slowed by the adapter."""
    policy = load_policy(str(trained), dtype="float32")
    if not hasattr(policy, "merge_and_unload"):
        return trained
    shutil.rmtree(target, ignore_errors=True)  # a killed run may have left half a model
    policy.merge_and_unload().save_pretrained(target)
    load_tokenizer(base).save_pretrained(target)
    return target


def judge_policy(
    policy: Policy, reference: Policy, prompts: list[str], decodings: Sequence[Sampling], judge: Judge, folder: Path
) -> Decoded:
    """Judge one completion of each prompt under each decoding; the reference at temperature 1 has KL 0 to itself.

    Prompts that do not fit the policy's window are left out: one place for each of the others. All policies of a study
    start from one model, so they leave out the same prompts; ``same_prompts`` holds a report to that.

    Raises:
        DataError: no prompt fits.
    """
    made: Decoded = {}
    for decoding in decodings:
        (written,), left_out = on_same_prompts([write_completions(policy, prompts, decoding, folder)])
        kl = np.zeros(len(written.prompts))
        if policy.model != reference.model or decoding.temperature != 1:
            kl = measure_kl(written, reference, folder).log_ratios
        made[f"{decoding.temperature:g}"] = {
            "reward": np.round(score(written, judge, folder), 4).tolist(),
            "kl": np.round(kl, 4).tolist(),
            "tokens": [len(ids) for ids in written.table["token_ids"]],
            **({"left_out": left_out} if left_out else {}),
        }
    return made


def same_prompts(decoded: Sequence[dict[str, Any]]) -> None:
    """Refuse judged policies whose rewards are not those of the same prompts, because they are compared place by place.

    Args:
        decoded: values of ``Decoded``.

    Raises:
        DataError: they left out different prompts.
    """
    parts = [one.get("left_out", {}) for one in decoded]
    kinds = sorted({(part.get("count", 0), tuple(part.get("prompts", ()))) for part in parts})
    if len(kinds) > 1:
        named = " against ".join(f"{count} ({'; '.join(names) or 'none'})" for count, names in kinds)
        raise DataError(
            f"judged policies left out different prompts: {named}, expected the same ones for all",
            code="prompt-refused",
            hint="judge all policies again on prompts that fit the window of each",
        )
