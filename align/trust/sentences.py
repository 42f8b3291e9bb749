"""What the numbers of align/trust/analysis.py mean, in sentences for a person. Pure."""

from math import exp
from typing import Any

from align.trust.analysis import labels_worth, overtaken_at

NAMES = {"dpo": "plain DPO", "madpo": "MADPO", "soft_labels": "soft labels"}
SOURCES = {
    "in-sample": (
        "These margins come from a reward model trained on the same pairs, each margin by a model that has seen its "
        "label: nothing here can be believed. Cross-fit them (reward.folds: 5)."
    ),
    "cross-fitted": (
        "These margins come from a reward model trained on these same labels (cross-fitted): they hold no information "
        "that the labels do not; they can help only because the reward model generalises better than the policy."
    ),
    "outside": "These margins come from a reward model trained on other labels: they may know what these do not.",
    "unknown": (
        "The table does not say where its margins come from. Everything here holds only if no margin was made by a "
        "model that has seen the pair's own label."
    ),
}
ENOUGH = 100
"""Multiple of the pairs beyond which more labels are not a plan."""


def sentences(found: dict[str, Any], source: str) -> dict[str, str]:
    """One sentence for each question.

    Args:
        found: what ``analyse`` returned, with ``signs``.
        source: where the margins come from, a key of ``SOURCES``.
    """
    gains = found["gains"]
    return {
        "verdict": setting(found),
        "labels": (
            f"Labels alone: a policy trained on them guesses a label it has not seen {_nats(gains['labels'])} better "
            "than a coin."
        ),
        "margin": (
            f"Margins alone: they agree with {_share(found['agreement'])} of the labels and are "
            f"{_nats(gains['margin'])} better than a coin; a margin of 1 stands for odds of "
            f"{_odds(found['slope'])} to 1."
        ),
        "both": f"Both together: {_nats(gains['both'])} better than a coin. {_worth(found)}",
        "against": " ".join(_against(name, one) for name, one in found["against"].items()),
        "source": SOURCES[source],
        "more": _more(found),
        "shared": _shared(found.get("signs", {})),
    }


def setting(found: dict[str, Any]) -> str:
    """Which setting, in words, with the interval of the trust."""
    chosen, interval = found["chosen"], found["interval"]["trust"]
    t, g = chosen["trust"], chosen["strength"]
    if found["slope"] == 0:
        return "Train with plain DPO: the margins contradict the labels at least as often as they agree."
    if t == 0 and g == 0:
        said = "Train with plain DPO: the labels, not the margins"
    elif t == 0:
        said = f"Train with MADPO at {'full' if g == 1 else f'{g:.0%}'} strength: the labels, weighted by the margins"
    elif t == 1:
        said = "Train with soft labels: the margins, not the labels"
    else:
        weight = (
            "" if g == 0 else f", the labels' part weighted by MADPO at {'full' if g == 1 else f'{g:.0%}'} strength"
        )
        said = f"Train on a mix: {t:.0%} margins, {1 - t:.0%} labels{weight}"
    return (
        f"{said} (trust {t:g}, strength {g:g}; over resampled pairs held-out labels alone choose a trust from "
        f"{interval[0]:g} to {interval[1]:g})."
    )


def _against(name: str, difference: dict[str, float]) -> str:
    if difference["low"] <= 0 <= difference["high"]:
        return f"Against {NAMES[name]}: no measurable difference, {_nats(difference)}."
    word = "better" if difference["low"] > 0 else "worse"
    return f"Against {NAMES[name]}: {word} by {_nats(difference)} on unseen labels."


def _worth(found: dict[str, Any]) -> str:
    worth = labels_worth(found["curve"])
    if worth is None:
        return "No number of further labels in sight would do what the margins do."
    if worth < 0.05:
        return "The margins replace no labels."
    return f"One margin is worth about {worth:.1f} label{'' if round(worth, 1) == 1 else 's'}."


def _more(found: dict[str, Any]) -> str:
    curve, chosen = found["curve"], found["chosen"]
    points = ", ".join(f"{point['labels']:.3f} with {point['share']:.0%}" for point in curve)
    said = f"More pairs: labels alone gain {points} of the pairs (nats a pair)"
    if chosen["trust"] == 0 and chosen["strength"] == 0:
        return f"{said}; the labels are already believed alone."
    times = overtaken_at(curve)
    if times is None or times > ENOUGH:
        return f"{said}; no number of pairs in sight would make the labels alone as good."
    if times <= 1:
        return f"{said}; labels alone are about as good already."
    return f"{said}; with about {times:.1f} times as many pairs the labels alone would do as well."


def _shared(signs: dict[str, dict[str, Any]]) -> str:
    clear = {name: sign for name, sign in signs.items() if sign["clear"]}
    if not signs:
        return "Shared errors: nothing to compare the margins with."
    if not clear:
        return f"Shared errors: no sign of one in {', '.join(signs)}."
    said = []
    for name, sign in clear.items():
        if name == "length":
            kind = "shorter" if sign["z"] < 0 else "longer"
            said.append(
                f"for a given margin the labels favour the {kind} response (z {sign['z']:.1f}; correlation of margin "
                f"and length difference {sign['correlation']:.2f}): the reward model misjudges length"
            )
        else:
            word = "less" if sign["z"] < 0 else "more"
            said.append(f"in {name} a margin says {word} than elsewhere (z {sign['z']:.1f}, slope {sign['slope']:.2f})")
    return f"Shared errors: {'; '.join(said)}."


def _nats(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} nats a pair ({estimate['low']:.3f} to {estimate['high']:.3f})"


def _share(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.0%} ({estimate['low']:.0%} to {estimate['high']:.0%})"


def _odds(slope: float) -> str:
    return f"{exp(min(slope, 20.0)):.2g}"
