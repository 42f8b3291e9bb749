"""From numbers to sentences: what stands out in a table of pairs, most important first, and what to do about it."""

from collections.abc import Callable, Iterator
from typing import Any

from align.stats import above, interval

STRONG = 0.6
"""Held-out accuracy from which a shortcut is worth acting on."""
OF_LENGTH = (
    "compare policies at equal lengths (`align eval compare`), or take the length out of the margins "
    "(`reward.length_residual: true`)"
)
NOISY = 0.1
"""Flip rate from which labels are called noisy."""
FAR = 0.05
"""Share of the chosen response's tokens that the model would not write from which pairs are called far."""
MANY_ALIKE = 0.1
MANY_TRUNCATED = 0.01
MANY_FALL = 0.5
ACT, LOOK, FINE = 2, 1, 0
Finding = dict[str, Any]


def findings(found: dict[str, Any]) -> list[Finding]:
    """Sentences of a diagnosis: each with ``level`` (2 act, 1 look, 0 nothing to do), ``says``, ``do`` and ``ids``.

    Args:
        found: ``shortcuts``, ``noise``, ``texts``, ``overlap``, ``tokens``, ``off_policy``, ``entanglement``, ``cost``
            of ``align.diagnosis.diagnose.diagnose``.
    """
    parts = [_shortcuts(found["shortcuts"]), _noise(found["noise"]), _texts(found["texts"])]
    makers: dict[str, Callable[[Any], Iterator[Finding]]] = {
        "overlap": _overlap, "tokens": _tokens, "off_policy": _off_policy, "entanglement": _entanglement, "cost": _cost,
    }  # fmt: skip
    parts += [make(found[name]) for name, make in makers.items() if found[name] is not None]
    said = [one for part in parts for one in part]
    return sorted(said, key=lambda one: -one["level"])


def _say(level: int, says: str, do: str = "", ids: list[str] | None = None) -> Finding:
    return {"level": level, "says": says, "do": do, "ids": ids or []}


def _shortcuts(shortcuts: list[dict[str, Any]]) -> Iterator[Finding]:
    if not shortcuts:
        yield _say(FINE, "Shortcuts were not looked for: fewer than 40 pairs, or fewer than 20 that share no text.")
        return
    single = [one for one in shortcuts if one["alarm"] and one["name"] != "all together"]
    for one in sorted(single, key=lambda found: -found["accuracy"]["value"]):
        value, name = one["accuracy"]["value"], one["name"]
        yield _say(
            ACT if value >= STRONG else LOOK,
            f"The {name} of the responses alone tells {interval(one['accuracy'])} of held-out labels (chance is 0.5): "
            "a model can learn it in place of what you mean.",
            OF_LENGTH if name == "length" else f"read some of these pairs; drop or balance those that differ by {name}",
            one["examples"],
        )
    if not single:
        best = max(one["accuracy"]["value"] for one in shortcuts)
        yield _say(
            FINE, f"No shortcut was found: the best of {len(shortcuts)} kinds tells {best:.2f} of held-out labels."
        )


def _noise(noise: dict[str, Any]) -> Iterator[Finding]:
    if noise["copies"]:
        yield _say(
            LOOK,
            f"{noise['copies']} of {noise['pairs']} rows are equal to an earlier row; each counts again in training.",
            "`align filter run` drops them by the rule `duplicate`",
        )
    if noise["repeated"]:
        rate = noise["flip_rate"]
        noisy = above(noise["disagreement"], 2 * NOISY * (1 - NOISY))
        ends = "" if rate["low"] is None else f" ({rate['low']:.2f} to {rate['high']:.2f})"
        yield _say(
            ACT if noisy else LOOK if noise["contradicted"] else FINE,
            f"{noise['contradicted']} of {noise['repeated']} pairs of responses that were judged more than once have "
            f"both labels. If judgments are independent, {rate['value']:.2f}{ends} of the labels are wrong, and no "
            f"reward model can agree with more than {noise['ceiling']:.2f} of them.",
            "measure how far to trust labels and margins (`align trust`) before choosing a loss" if noisy else "",
            [name for ids in noise["examples"] for name in ids[:2]],
        )
    if noise["circles"]:
        yield _say(
            LOOK,
            f"{noise['circles']} circles: a over b, b over c and c over a under one prompt; one of each three labels "
            "is wrong.",
        )
    if noise["minority_votes"] is not None:
        yield _say(
            FINE, f"On average {interval(noise['minority_votes'])} of the votes on a pair are against its label."
        )


def _texts(texts: dict[str, Any]) -> Iterator[Finding]:
    alike = texts["near_identical"]
    if alike["value"] >= MANY_ALIKE:
        yield _say(
            ACT,
            f"{interval(alike)} of the pairs have responses that are near-identical (90% of the words in common runs): "
            "a step moves both the same way, and the chosen response falls with the rejected one.",
            "add the likelihood of the chosen response: `loss: {terms: {dpo: 1.0, nll: 0.1}}`, or take `dpop`",
            texts["near_identical_ids"],
        )
    if texts["personal_data"]["value"] > 0:
        yield _say(
            LOOK,
            f"{interval(texts['personal_data'])} of the pairs hold what looks like personal data.",
            "`align filter run` drops them by the rule `pii`",
        )
    cut = texts["cut_off"]
    if max(cut.values()) > 0:
        yield _say(
            LOOK,
            f"{cut['chosen']:.0%} of the chosen and {cut['rejected']:.0%} of the rejected responses were cut off by a "
            "limit of tokens.",
            "sample again with a larger `max_new_tokens`",
        )
    if texts["most_common_prompt"] > max(2, 0.5 * texts["pairs"]):
        yield _say(
            LOOK,
            f"{texts['most_common_prompt']} of {texts['pairs']} pairs have one prompt: intervals count pairs that "
            "share responses as one.",
        )


def _overlap(overlap: dict[str, Any]) -> Iterator[Finding]:
    if overlap["pairs"]:
        yield _say(
            ACT,
            f"{overlap['pairs']} of {overlap['of']} pairs share texts with the held-out rows, so an evaluation on "
            "these would be too good.",
            "`align filter run --held-out FILE` drops them",
            overlap["ids"],
        )
    else:
        yield _say(
            FINE,
            f"None of {overlap['of']} pairs shares a prompt, a response or eight words with the held-out rows.",
        )


def _tokens(tokens: dict[str, Any]) -> Iterator[Finding]:
    cut, empty, fits = tokens["truncated"], tokens["without_response"], f"99% of the pairs fit into {tokens['p99']:.0f}"
    if empty["value"] > 0:
        yield _say(
            ACT,
            f"{interval(empty)} of the prompts alone fill max_length {tokens['max_length']}: nothing of the response "
            "is trained.",
            f"raise `max_length`; {fits} tokens",
        )
    elif cut["value"] > MANY_TRUNCATED:
        yield _say(
            LOOK,
            f"{interval(cut)} of the pairs are longer than max_length {tokens['max_length']} and lose their end.",
            f"raise `max_length`; {fits} tokens",
        )
    else:
        yield _say(FINE, f"Pairs have {tokens['median']:.0f} tokens in the median; {fits}.")


def _off_policy(off: dict[str, Any]) -> Iterator[Finding]:
    if not off["pairs"]:
        yield _say(LOOK, "No pair of the sample fits into max_length, so its distance to the model was not measured.")
        return
    chosen, never = off["chosen"]["logp_per_token"], off["chosen"]["never"]
    says = (
        f"The model gives the chosen responses {interval(chosen)} nats a token and would practically never write "
        f"{interval(never)} of their tokens."
    )
    if above(never, FAR):
        worst = min(off["groups"], key=off["groups"].get) if off["groups"] else None
        where = f" Farthest is the group {worst!r} ({off['groups'][worst]:.2f})." if worst is not None else ""
        yield _say(
            LOOK,
            f"{says}{where} DPO moves such responses little and spends its steps on pushing rejected ones down.",
            "fine-tune on the chosen responses first, or build pairs from the model's own samples "
            "(`align pairs build`)",
        )
    else:
        yield _say(FINE, says)
    easy = off["preferred"]
    yield _say(FINE, f"In {interval(easy)} of the pairs it finds the chosen response likelier per token already.")


def _entanglement(risk: dict[str, Any]) -> Iterator[Finding]:
    falls = risk["chosen_falls"]
    many = falls["value"] >= MANY_FALL
    yield _say(
        LOOK if many else FINE,
        f"A first step of {risk['loss']} on a pair would lower the chosen response in {interval(falls)} of "
        f"{risk['pairs']} measured pairs (cosine of the two gradients {interval(risk['cosine'])}).",
        "`align entangle losses` shows which loss would do it least" if many else "",
        risk["ids"] if many else [],
    )


def _cost(cost: list[dict[str, Any]]) -> Iterator[Finding]:
    for one in cost:
        if "problem" in one:
            yield _say(LOOK, f"{one['name']}: seconds and memory could not be measured: {one['problem']}")
            continue
        gib = (one["bytes_fixed"] + (one["bytes_per_pair"] or 0)) / 2**30
        fits = one["largest_batch"]
        batch = f"at least {fits} pairs a step fit" if one["at_least"] else f"{fits} pairs a step fit"
        says = (
            f"{one['name']}: about {one['seconds_per_epoch']:.0f} seconds an epoch, {gib:.1f} GiB with one of the "
            f"longest pairs; {batch} into the {one['free'] / 2**30:.1f} GiB that are free."
        )
        yield _say(ACT if fits == 0 else FINE, says, "take an adapter, or a smaller `max_length`" if fits == 0 else "")
