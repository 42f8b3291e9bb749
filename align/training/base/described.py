"""What a trainer knows about its own training: for the model card of every folder it saves, and for trackers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel

from align.data.table_facts import TableFacts
from align.io.console import log
from align.io.stage import versions
from align.models.model_card import (
    POLICY,
    REWARD_MODEL,
    TrainingFacts,
    add_results,
    base_model_id,
    papers_of,
    write_card,
)
from align.training.base.card_settings import adapter_text, base_of, changed_fields, precision_of
from align.training.base.tracked_runs import ShowConfig, missing_tracker

PARTS = ("pair_weights", "gradient_remedy", "token_mask", "tilt", "sharpness")
"""Fields of a trainer's arguments that change the loss of a pair or its gradient."""


HELD_OUT = {
    "loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "reward margin", "accuracy": "accuracy",
    "margin": "reward margin",
}  # fmt: skip
"""Key of a held-out number in the log -> its name on the card."""


class Described:
    """Mixin for a transformers Trainer, to be named before its class.

    Every saved folder gets a model card that says what was trained; the cards of peft and trl, which name neither the
    loss nor its parameters, are replaced. Repositories on the hub are created private. Trackers show the loss, its
    parameters and the data with the trainer's arguments.
    """

    args: Any
    state: Any
    model: Any
    accelerator: Any
    _given_loss: Any
    data_facts: TableFacts | None = None
    """The pairs that are trained on."""
    extra_config: dict[str, Any]
    """What trackers show in addition."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.extra_config = {}
        with missing_tracker("args.report_to"):
            super().__init__(*args, **kwargs)
        self.add_callback(ShowConfig(self))  # type: ignore[attr-defined]

    @property
    def _bound(self) -> Any:
        """The objective, or the loss that was asked for, with its parameters."""
        return getattr(self, "objective", None) or self._given_loss

    @property
    def facts(self) -> TrainingFacts:
        """What the model card says."""
        bound, data, args = self._bound, self.data_facts, self.args
        parts = {name: getattr(args, name) for name in PARTS if getattr(args, name, None) is not None}
        parts |= {name: value for name, value in self.extra_config.items() if name in PARTS and value is not None}
        return TrainingFacts(
            kind=REWARD_MODEL if hasattr(self, "objective") else POLICY,
            method=bound.spec.name,
            summary=bound.spec.summary,
            sources=papers_of(bound.spec.function.__doc__),
            parameters=dict(bound.parameters),
            base_model=base_model_id(getattr(self.model.config, "_name_or_path", None)),
            pairs=None if data is None else data.pairs,
            fingerprint=None if data is None else data.fingerprint,
            margins=None if data is None else data.margins,
            settings=parts | self._settings(),
            versions=versions(),
        )

    def _settings(self) -> dict[str, Any]:
        """Settings of the training."""
        args = self.args
        pairs = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        settings = {
            "steps": self.state.global_step,
            "pairs per step": pairs,
            "learning rate": args.learning_rate,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "max_length": args.max_length,
            "precision": precision_of(args, self.model),
            "seed": args.seed,
        }
        if isinstance(self.model, PeftModel):
            settings["adapter"] = adapter_text(self.model.peft_config[self.model.active_adapter])
        return settings | base_of(self.model) | changed_fields(args) | self._of_pairs()

    def _of_pairs(self) -> dict[str, Any]:
        """What a card says about the reference and the pairs, where that is not the usual."""
        found: dict[str, Any] = {}
        if getattr(self, "_given_reference", False):
            found["reference"] = "another model, which was given"
        table, data = getattr(self, "train_dataset", None), self.data_facts
        if not isinstance(table, Dataset) or data is None:
            return found
        if len(table) < data.pairs:
            found["pairs left out"] = f"{data.pairs - len(table)} (equal responses, or no room for one)"
        if data.weighted and not hasattr(self, "objective"):
            found["weights"] = "the column `weight` of the pairs"
        return found

    @property
    def tracked_config(self) -> dict[str, Any]:
        """What trackers show besides the trainer's arguments: plain JSON values, equal in a resumed training."""
        facts = self.facts
        return {
            "loss": facts.method,
            "loss_parameters": dict(facts.parameters),
            "base_model": facts.base_model,
            "data": {"pairs": facts.pairs, "fingerprint": facts.fingerprint, "margins": facts.margins},
            **self.extra_config,
        }

    @property
    def trained_under(self) -> dict[str, Any]:
        """The loss, its parameters and the pairs, see ``ExactResume``.

        Pairs that are read in their order may have become more: a stream gives as many as ``max_steps`` takes.
        """
        bound, data = self._bound, self.data_facts
        parts = {name: getattr(self.args, name) for name in PARTS if getattr(self.args, name, None) is not None}
        shown: dict[str, Any] = {"loss": bound.spec.name, "parameters": dict(bound.parameters), "parts": parts}
        if data is not None and self.args.train_sampling_strategy != "sequential":
            shown["data"] = f"{data.pairs} pairs, fingerprint {data.fingerprint}"
        return shown

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as transformers does, and write the model card next to the weights."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        self._write_card(Path(output_dir or self.args.output_dir))

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the model card into ``output_dir``, where trl's would be; the arguments are trl's and not used."""
        self._write_card(Path(self.args.output_dir))

    def _write_card(self, folder: Path) -> None:
        if self.args.should_save and folder.is_dir():
            write_card(folder, self.facts, adapter=isinstance(self.model, PeftModel))
            rows = list(_held_out_rows(self.state.log_history, self.state.global_step))
            if rows:
                note = "On held-out pairs at the last step, without intervals; `align eval` measures with them."
                add_results(folder, rows, note)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository on the hub as transformers does, private unless ``hub_private_repo`` is false."""
        if private is None and self.args.hub_private_repo is None:
            private = True
            log.info("push_to_hub: a new repository is private; hub_private_repo: false makes it public")
        super().init_hf_repo(token, private)  # type: ignore[misc]


def _held_out_rows(history: Sequence[Mapping[str, Any]], step: int) -> Iterator[tuple[str, str]]:
    """Loss, accuracy and reward margin of each held-out table that was evaluated at this step, as a card shows them."""
    for entry in history:
        losses = [name for name in entry if name.startswith("eval_") and name.endswith("loss")]
        for name in losses if entry.get("step") == step else ():
            table = name.removeprefix("eval_").removesuffix("loss").strip("_")
            for key, shown in HELD_OUT.items():
                value = entry.get(name.removesuffix("loss") + key, entry.get(f"eval_{key}"))
                if isinstance(value, float):
                    yield f"{shown}, {table}" if table else shown, f"{value:.4g}"
