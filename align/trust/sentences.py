"""Sentences for users from the numbers of align/trust/analysis.py; pure functions."""

from math import exp
from typing import Any

from align.stats import above, below, excludes
from align.trust.analysis import labels_worth, overtaken_at

NAMES = {"dpo": "plain DPO", "madpo": "MADPO", "soft_labels": "soft labels"}
SOURCES = {
    "in-sample": (
        "These margins come from a reward model trained on the same pairs, each margin by a model that has seen its "
        "label: do not rely on anything here. Cross-fit them (reward.folds: 5)."
    ),
    "cross-fitted": (
        "These margins come from a reward model trained on these same labels (cross-fitted): they carry no information "
        "beyond the labels; they can help only if the reward model generalizes better than the policy."
    ),
    "outside": "These margins come from a reward model trained on other labels: they may add information to these.",
    "unknown": (
        "The table does not say where its margins come from. Everything here holds only if no margin comes from a "
        "model that has seen the pair's own label."
    ),
}
ENOUGH = 100
"""If the estimate needs more than this multiple of the present pairs, do not recommend labeling more."""


def sentences(found: dict[str, Any], source: str) -> dict[str, str]:
    """Write one sentence or two for each question.

    Args:
        found: result of ``analyze``, with ``signs``.
        source: where the margins come from, a key of ``SOURCES``.
    """
    gains = found["gains"]
    return {
        "verdict": setting(found),
        "labels": f"Labels alone: a policy trained on them {_over_chance(gains['labels'])}.",
        "margin": (
            f"Margins alone: they agree with {_share(found['agreement'])} of the labels; their sigmoid "
            f"{_over_chance(gains['margin'])}{_odds(found)}."
        ),
        "both": f"Both together: a policy trained on them {_over_chance(gains['both'])}.{_worth(found)}",
        "against": _against_all(found),
        "source": SOURCES[source],
        "more": _more(found),
        "shared": _shared(found.get("signs", {})),
    }


def setting(found: dict[str, Any]) -> str:
    """Describe the chosen setting, with the 95% interval of the trust, or say that the data cannot tell."""
    chosen, interval = found["chosen"], found["interval"]["trust"]
    t, g = chosen["trust"], chosen["strength"]
    if not found["decided"]:
        return (
            f"These data cannot tell; plain DPO is the default: on {found['pairs']} pairs no setting has a lead, over "
            "chance and over the other loss, beyond its 95% interval."
        )
    if found["slope"] == 0:
        return "Train with plain DPO: the margins contradict the labels more often than they agree."
    if t == 0 and g == 0:
        advice = "Train with plain DPO: the labels, not the margins"
    elif t == 0:
        advice = f"Train with MADPO at {'full' if g == 1 else f'{g:.0%}'} strength: the labels, weighted by the margins"
    elif t == 1:
        advice = "Train with soft labels: the margins, not the labels"
    else:
        weight = (
            "" if g == 0 else f", the labels' part weighted by MADPO at {'full' if g == 1 else f'{g:.0%}'} strength"
        )
        advice = f"Train on a mix: {t:.0%} margins, {1 - t:.0%} labels{weight}"
    return (
        f"{advice} (trust {t:g}, strength {g:g}; over bootstrap samples held-out labels alone choose a trust from "
        f"{interval[0]:g} to {interval[1]:g})."
    )


def _against_all(found: dict[str, Any]) -> str:
    if not found["decided"]:
        return f"Against plain DPO: no lead that these data show, {_nats(found['against']['dpo'])}."
    return " ".join(_against(name, one) for name, one in found["against"].items())


def _against(name: str, difference: dict[str, float]) -> str:
    if not excludes(difference, 0.0):
        return f"Against {NAMES[name]}: no measurable difference, {_nats(difference)}."
    word = "better" if difference["value"] > 0 else "worse"
    return f"Against {NAMES[name]}: {word} by {_nats(difference, abs(difference['value']) / difference['value'])}."


def _over_chance(gain: dict[str, Any]) -> str:
    if above(gain, 0.0):
        return f"predicts an unseen label {_nats(gain)} better than chance"
    if below(gain, 0.0):
        return f"predicts an unseen label worse than chance, by {_nats(gain, -1)}"
    return f"is not measurably better than chance at an unseen label, {_nats(gain)}"


def _worth(found: dict[str, Any]) -> str:
    """What the margins are worth in labels; nothing unless the chosen setting leads plain DPO."""
    chosen = found["chosen"]
    if not found["decided"] or (chosen["trust"] == 0 and chosen["strength"] == 0):
        return ""
    worth = labels_worth(found["curve"])
    if worth is None:
        return " No number of further labels in sight would replace the margins."
    if worth < 0.05:
        return ""
    return f" One margin is worth about {worth:.1f} label{'' if round(worth, 1) == 1 else 's'}."


def _more(found: dict[str, Any]) -> str:
    curve, chosen = found["curve"], found["chosen"]
    points = ", ".join(f"{point['labels']:.3f} with {point['share']:.0%}" for point in curve)
    gain = f"More pairs: labels alone gain {points} of the pairs (nats a pair)"
    if not found["decided"]:
        return f"{gain}; more pairs may show a difference where these show none."
    if chosen["trust"] == 0 and chosen["strength"] == 0:
        return f"{gain}; the chosen setting uses the labels alone already."
    times = overtaken_at(curve)
    if times is None or times > ENOUGH:
        return f"{gain}; no number of pairs in sight would make labels alone as good."
    if times <= 1:
        return f"{gain}."
    return f"{gain}; with about {times:.1f} times as many pairs labels alone would be as good."


def _shared(signs: dict[str, dict[str, Any]]) -> str:
    clear = {name: sign for name, sign in signs.items() if sign["clear"]}
    if not signs:
        return "Shared errors: there is nothing to compare the margins with."
    if not clear:
        return f"Shared errors: no sign of one in {', '.join(signs)}."
    parts = []
    for name, sign in clear.items():
        if name == "length":
            kind = "shorter" if sign["z"] < 0 else "longer"
            parts.append(
                f"at a given margin the labels favor the {kind} response (z {sign['z']:.1f}; correlation of margin "
                f"and length difference {sign['correlation']:.2f}): the reward model misjudges length"
            )
        else:
            word = "less" if sign["z"] < 0 else "more"
            parts.append(
                f"in {name} a margin says {word} about the label than elsewhere "
                f"(z {sign['z']:.1f}, slope {sign['slope']:.2f})"
            )
    return f"Shared errors: {'; '.join(parts)}."


def _nats(estimate: dict[str, Any], sign: float = 1.0) -> str:
    value, ends = sign * estimate["value"], [estimate["low"], estimate["high"]]
    if None in ends:
        return f"{value:.3f} nats a pair (no interval)"
    low, high = sorted(sign * end for end in ends)
    return f"{value:.3f} nats a pair ({low:.3f} to {high:.3f})"


def _share(estimate: dict[str, Any]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.0%} (no interval)"
    return f"{estimate['value']:.0%} ({estimate['low']:.0%} to {estimate['high']:.0%})"


def _odds(found: dict[str, Any]) -> str:
    """What a margin of 1 means, if the margins predict the labels."""
    if not above(found["gains"]["margin"], 0.0):
        return ""
    return f"; a margin of 1 means odds of {exp(min(found['slope'], 20.0)):.2g} to 1"
