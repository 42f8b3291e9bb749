"""docs/losses.md, written from the registry.

python -m align.losses.page > docs/losses.md      # writes it again
"""

import sys

from align.losses.entries_likelihood import LIKELIHOOD_SPECS
from align.losses.entries_margin import MARGIN_SPECS
from align.losses.entries_reference import DPO_SPECS, RATIO_SPECS
from align.losses.entries_step import STEP_SPECS, TOKEN_SPECS
from align.losses.entries_unpaired import UNPAIRED_SPECS
from align.losses.registry import ALIASES, LOSSES
from align.losses.spec import LossSpec
from align.losses.sums import TRL_DEFAULTS

GROUPS = (
    ("DPO and its variants", DPO_SPECS),
    ("Other losses of log-ratios to the reference", RATIO_SPECS),
    ("Losses that read a reward margin", MARGIN_SPECS),
    ("Losses without a reference", LIKELIHOOD_SPECS),
    ("Losses that compare the pairs of a step", STEP_SPECS),
    ("Losses that read tokens", TOKEN_SPECS),
    ("Losses of single responses with thumbs", UNPAIRED_SPECS),
)
HEAD = """# Losses

Written by `python -m align.losses.page` from the registry; do not edit it. {count} losses; any of them, and any
weighted sum of them, is a method of a run:

```yaml
train:
  methods:
    plain: {{loss: dpo, parameters: {{beta: 0.1}}}}
    kept_up: {{loss: {{terms: {{madpo: 1.0, nll: 0.1}}}}, parameters: {{beta: 0.1}}}}
    two_betas: {{loss: {{terms: {{dpo: 1.0, ipo: {{weight: 0.5, parameters: {{beta: 0.3}}}}}}}}}}
    mpo: {{loss_type: [sigmoid, bco_pair, sft], loss_weights: [0.8, 0.2, 1.0]}}      # trl's fields, as they are
```

- `parameters` of a sum go to every term that knows them, unless the term has its own. A sum is logged term by term as
  `loss/<name>`, the mean over the pairs of a step with their weights, before the term's own weight.
- Other programs' names: {aliases}.
  trl's other names are the same here.
- `loss_type` has trl's defaults ({defaults}); under `loss` the defaults are those
  below.
- trl averages `sft` over the tokens of a batch, `nll` here over those of each response, as every other loss.
- Everything that is wrong with a sum (an unknown name, a weight that is missing or not above 0, a parameter that no
  term has) is named at once, by `--dry-run` as well. A sum needs margins if one of its terms does. All terms share one
  reference: the model that the training starts from, or `train.reference`.
- A `weight` column multiplies the whole sum. `remedy`, `token_mask` and `align entangle` need a loss of the log-probs
  of one pair: not one that compares pairs or reads tokens, alone or in a sum.

Letters: s is the sigmoid; logp, ref are sums over the tokens of a response under policy and reference, in nats; w the
chosen, l the rejected response; c = logp - ref; h = c_w - c_l; x = logp / |y|, the mean over its tokens; m the margin.

Losses that compare pairs see all pairs of an optimizer step, over all processes and accumulated batches, in the order
of the table: `per_device_train_batch_size`, `gradient_accumulation_steps`, `max_tokens_per_device` and the number of
processes do not change them. Where a step has several forward passes, each pair costs one more without gradient.

Losses that need the reference's tokens run the reference in every step: with an adapter it is the model without it,
otherwise a second model in memory.

## Another reference

`train.reference` (in Python `ref_model=`) names another model, or the folder of an adapter: a policy that was trained
once already (Pre-DPO, arXiv 2504.15843), another supervised model, one fixed model in every round of `align iterate`.
Its tokens must have the policy's ids, which is checked before training. It is loaded with `model_init_kwargs`, as the
policy is, and stays in memory; its log-probs are computed once unless `precompute_ref_log_probs: false`. With
`sync_ref_model: true` and all weights trained, the reference starts there and follows the policy every
`ref_model_sync_steps` steps; a resumed training goes on with the reference of its checkpoint. `align entangle trace`
reads it from the run. A run's evaluation compares every policy with `train.model`, whatever the reference of its loss.
"""
TABLE = ["", "| loss | of a pair | needs | defaults | source | what it is, and what for |", "|---|---|---|---|---|---|"]
TAIL = """
## Not there

TDPO and epsilon-DPO need the whole distributions of both models at every token, which the completion head here never
holds at once. Losses whose form could be read in no source (chi-PO's clip, xi-DPO) are left
out.
"""


def needs(spec: LossSpec) -> str:
    """What a loss needs beyond the pairs."""
    found = []
    if spec.needs_margin:
        found.append("margin")
    if spec.reads_reference:
        found.append("reference's tokens" if spec.tokens == "reference" else "reference")
    if spec.unpaired:
        found.append("thumbs, or pairs")
    if spec.coupled:
        found.append(f"all {'responses' if spec.unpaired else 'pairs'} of the step")
    return ", ".join(found) or "nothing"


def render() -> str:
    """The page as Markdown."""
    parts = [
        HEAD.format(
            count=len(LOSSES),
            aliases=", ".join(f"`{theirs}` is `{name}`" for theirs, name in ALIASES.items()),
            defaults=", ".join(f"{name} {value:g}" for name, value in TRL_DEFAULTS.items()),
        )
    ]
    for title, specs in GROUPS:
        parts += ["", f"## {title}", *TABLE, *(_row(spec) for spec in specs)]
    return "\n".join([*parts, TAIL.rstrip(), ""])


def _row(spec: LossSpec) -> str:
    defaults = ", ".join(f"{name} {_shown(value)}" for name, value in spec.defaults.items()) or "none"
    cells = (f"`{spec.name}`", spec.formula, needs(spec), defaults, spec.source, f"{spec.summary}. For: {spec.when}")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _shown(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.6g}"


if __name__ == "__main__":
    sys.stdout.write(render())
