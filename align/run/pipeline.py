"""Run the stages of a run: what each depends on decides whether it is up to date.

    pairs-reward -> reward -> crossfit -.
                      |                 v
        sample / pairs -----------> margins -> heldout -> filter, trust -> train-METHOD -> generate-METHOD -.
                                                                               report <- evaluate <----------'

The work of a stage is in align/run/stages/; this file only defines what it depends on.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.config import (
    EvalSamplesSection,
    EvaluateSection,
    FilterSection,
    PairsSection,
    RewardSection,
    RunConfig,
    TrainSection,
)
from align.config.decoding import LATER, DecodingSection
from align.data.pairs import read_pairs
from align.data.prompts import section_prompts
from align.distributed import process_rank, world_size
from align.errors import ConfigError, EnvironmentProblem
from align.generation.types import SAMPLING
from align.io.console import log
from align.io.files import read_json, write_json
from align.io.hashing import digest, fingerprint_source
from align.io.secrets import redact
from align.io.stage import Stage, finished_stage, read_manifest, run_stage
from align.models.chat_template import rendered_today
from align.models.folders import fingerprint_model
from align.models.message_checks import is_conversational
from align.run.engines import engine_of
from align.run.log import run_log
from align.run.manifest import write_run_manifest
from align.run.plan import (
    HELD_OUT,
    LOSS_REVISIONS,
    PROBES_REVISION,
    REVISIONS,
    TOGETHER,
    TRUST,
    TRUST_NUMBERS,
    plan,
)


def check(config: RunConfig, *, tables: bool = False) -> None:
    """Check what can be checked before a model loads: losses, parameters, trainer fields, files.

    With ``tables``, the pairs are read as well.

    Raises:
        AlignError: the first problem; it names the key or file.
    """
    from align.run.checks import check_config

    check_config(config, tables=tables)


def run_pipeline(config: RunConfig, *, command: str, until: tuple[str, ...] = ()) -> Path:
    """Run every stage whose inputs have changed, write the report, and return its path.

    Args:
        config: the run.
        command: command line that repeats the run; shown in the report.
        until: kinds of stages after which to stop (``("reward", "crossfit")``); empty: run all stages.

    Raises:
        AlignError: an error that the user can fix; finished stages stay as they are.
    """
    root = config.folder
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{root}: cannot be written ({error.strerror})", code="output-folder") from None
    with run_log(root):
        return _run_stages(config, root, command, until)


def _run_stages(config: RunConfig, root: Path, command: str, until: tuple[str, ...]) -> Path:
    """Run the stages and write the report; see ``run_pipeline``."""
    runner = _Runner(config, root)
    every = names = plan(config)
    if until:
        last = max((k for k, name in enumerate(names) if name.split("-")[0] in until), default=-1)
        if last < 0:
            section = "reward" if "reward" in until else "train"
            raise ConfigError(f"{config.name}: has no section `{section}`", code="config-key", hint="add it")
        names = names[: last + 1]
    done = [runner.run(name) for name in names]
    done += [stage for name in every[len(names) :] if (stage := runner.current(name)) is not None]
    report = root / "report.html"
    if _is_current(report, done):
        log.info("nothing to do: all %d stages of %s are up to date", len(done), root)
        return report
    if process_rank() > 0:
        return report
    from align.reports.collect import collect
    from align.reports.run_page import write_report
    from align.run.figures import publish_figures

    seconds = {stage.name: round(stage.seconds, 1) for stage in done}
    collected = collect(config, seconds=seconds, command=command)
    write_json(root / "report.json", collected)
    write_json(root / "summary.json", collected["summary"])
    publish_figures(config, collected)
    write_run_manifest(config, done, command, until)
    return write_report(root)


def _is_current(report: Path, stages: list[Stage]) -> bool:
    """Whether all stages were skipped and the report was made from these stages."""
    numbers = report.with_name("report.json")
    if not all(stage.skipped for stage in stages) or not report.exists() or not numbers.exists():
        return False
    try:
        found = read_json(numbers)["run"]["fingerprints"]
    except (ValueError, LookupError, TypeError):
        return False
    page_is_newer = report.stat().st_mtime_ns >= numbers.stat().st_mtime_ns
    return page_is_newer and found == {stage.name: stage.key[:16] for stage in stages}


class _Runner:
    """Run stages in order; the key of a stage includes the keys of the stages that it reads."""

    def __init__(self, config: RunConfig, root: Path) -> None:
        self.config = config
        self.root = root
        self.keys: dict[str, str] = {}

    def run(self, name: str) -> Stage:
        """Run (or skip) the stage called ``name``."""
        together = name.split("-", maxsplit=1)[0] in TOGETHER
        stage = run_stage(name, self.root / name, self._made_from(name), self._work(name), collective=together)
        self.keys[name] = stage.key
        return stage

    def current(self, name: str) -> Stage | None:
        """The stage called ``name`` if it is finished and its inputs have not changed since; None otherwise."""
        if read_manifest(self.root / name) is None:  # saves hashing models and data for the key
            return None
        found = finished_stage(name, self.root / name, self._made_from(name))
        if found is not None:
            self.keys[name] = found.key
        return found

    def _made_from(self, name: str) -> dict[str, Any]:
        return {"after": self._after(name)} | self._inputs(name)

    def _after(self, name: str) -> dict[str, str]:
        """Keys of the stages that ``name`` reads."""
        kind = name.split("-", maxsplit=1)[0]
        rewarded = "pairs-reward" if "pairs-reward" in self.keys else "pairs"
        reads: dict[str, tuple[str, ...]] = {
            "pairs": (),
            "reward": (rewarded,),
            "crossfit": (rewarded,),
            "sample": ("reward", "crossfit"),
            "margins": ("pairs", "sample", "reward", "crossfit"),
            HELD_OUT: ("margins", "reward"),
            "filter": ("margins", HELD_OUT),
            "trust": ("margins", HELD_OUT),
            "train": ("margins", HELD_OUT, "filter", *((TRUST,) if self._is_trusted(name) else ())),
            "generate": (name.replace("generate-", "train-"),),
            "evaluate": tuple(key for key in self.keys if key.startswith(("generate-", "margins", "reward"))),
        }
        return {key: self.keys[key] for key in reads[kind] if key in self.keys}

    def _inputs(self, name: str) -> dict[str, Any]:
        """Configuration and content of the files that ``name`` reads."""
        config, kind = self.config, name.split("-", maxsplit=1)[0]
        inputs: dict[str, Any] = {"seed": config.seed}
        if kind in REVISIONS:
            inputs["revision"] = REVISIONS[kind]
        if kind == "pairs":
            reward = config.reward
            source = reward.pairs if name == "pairs-reward" and reward else config.pairs
            inputs["source"] = _source(source)
            inputs["heldout"] = _source(reward.eval_pairs if reward else None)
            inputs["eval_fraction"] = reward and reward.eval_fraction
            if name == "pairs" and reward is not None and reward.pairs is not None:
                inputs["whole"] = True  # none of the policy's pairs are held out
        if kind in ("reward", "crossfit") and config.reward:
            skipped = {"pairs", "eval_pairs", "eval_fraction"} | ({"folds"} if kind == "reward" else set())
            inputs["settings"] = config.reward.made_from(without=skipped)
            inputs["model"] = fingerprint_model(config.reward.model)
        if kind in ("sample", "trust", "train", "generate") and config.train:
            inputs["model"] = fingerprint_model(config.train.model)
        if kind == HELD_OUT and config.train and config.train.eval_pairs:
            inputs["source"] = _source(config.train.eval_pairs)
        if kind == "filter" and config.filter:
            inputs |= _of_filter(config.filter)
        if kind == "train" and config.train:
            if config.train.reference is not None:
                inputs["reference"] = fingerprint_model(config.train.reference)
            method = config.train.methods[name.removeprefix("train-")]
            inputs["loss"] = method.made_from(without=set())
            revised = {loss: LOSS_REVISIONS[loss] for loss in method.names if loss in LOSS_REVISIONS}
            inputs |= {"loss_revisions": revised} if revised else {}
            inputs["settings"] = config.train.made_from(without={"methods", "trust", "allow_in_sample"})
            inputs |= self._sampled_from(config.train.eval_samples)
            inputs |= {"probes": PROBES_REVISION} if config.train.entanglement else {}
        if kind == "trust" and config.train:
            inputs |= _of_trust(config.train)
        if self._is_trusted(name):
            inputs["trust"] = read_json(self.root / TRUST / TRUST_NUMBERS)
        if kind in ("sample", "generate", TRUST) and config.train and config.train.quantization:
            inputs["quantization"] = config.train.quantization
        inputs |= self._rendered(kind)
        trusting = [part for part in (config.train, config.reward) if part is not None and part.trusts_remote_code]
        if trusting:
            inputs["trust_remote_code"] = [part.model for part in trusting]
        if kind == "evaluate" and config.evaluate:
            inputs |= _judging(config.evaluate)
        settings = {"sample": config.sample, "generate": config.evaluate}.get(kind)
        if settings is not None:
            inputs["settings"] = _decoding(config, settings)
            inputs["prompts"] = fingerprint_source(settings.prompts)
        return inputs

    def _sampled_from(self, samples: EvalSamplesSection | None) -> dict[str, Any]:
        """The prompts of the samples of a training, and their judge; nothing without samples."""
        if samples is None:
            return {}
        made: dict[str, Any] = {"sampling": SAMPLING}
        if samples.prompts is not None:
            made["prompts"] = fingerprint_source(samples.prompts)
        if self.config.evaluate is not None:
            made |= _judging(self.config.evaluate, while_training=True)
        return made

    def _rendered(self, kind: str) -> dict[str, str]:
        """What the date that a chat template writes adds to the key of a stage that reads messages."""
        part: RewardSection | TrainSection | None = None
        if kind in ("reward", "crossfit", "margins"):
            part = self.config.reward
        elif kind in ("sample", "trust", "train", "generate"):
            part = self.config.train
        if part is None:
            return {}
        return rendered_today(part.model, self._reads_messages, trust_remote_code=part.trusts_remote_code)

    def _reads_messages(self) -> bool:
        """Whether a pair table or a prompt file of the run has messages."""
        tables = [self.root / name / "train" for name in ("pairs", "pairs-reward")]
        if any(is_conversational(read_pairs(table)) for table in tables if table.exists()):
            return True
        sections = [section for section in (self.config.sample, self.config.evaluate) if section is not None]
        return any(not isinstance(prompt, str) for section in sections for prompt in section_prompts(section))

    def _is_trusted(self, name: str) -> bool:
        """Whether ``name`` trains a method with the loss ``trust``, and the run measures the trust."""
        if TRUST not in self.keys or self.config.train is None or not name.startswith("train-"):
            return False
        return TRUST in self.config.train.methods[name.removeprefix("train-")].names

    def _work(self, name: str) -> Callable[[Path], None]:
        def work(folder: Path) -> None:
            from align.run.stages import work_of

            work_of(name)(self.config, folder)

        return work


def _of_filter(chosen: FilterSection) -> dict[str, Any]:
    """Settings of a filter, and fingerprints of the models and files that it reads."""
    read = [chosen.embedding_model, chosen.embeddings, chosen.quality_model, chosen.held_out]
    read += [chosen.ood.model, chosen.ood.pairs.path] if chosen.ood else []
    return {
        "settings": chosen.model_dump(exclude={"processes"}),
        "read": [fingerprint_model(name) for name in read if name is not None],
    }


def _of_trust(train: TrainSection) -> dict[str, Any]:
    """Settings that the measurement of the trust reads."""
    return {
        "allow_in_sample": train.allow_in_sample,
        "max_length": train.trainer.get("max_length", "default"),
        "truncation": train.trainer.get("truncation_mode"),
        "turns": train.turns,
    }


def _decoding(config: RunConfig, section: DecodingSection) -> dict[str, Any]:
    """What a stage that samples depends on: keys that were added later, and the engine, only where they differ."""
    later = section.model_dump(include=set(LATER), exclude_defaults=True, exclude={"engine"})
    engine = engine_of(config, section)
    made = section.model_dump(exclude={"judge", "samples_shown", *LATER}) | later
    return made | ({} if engine == "transformers" else {"engine": engine})


def _judging(section: EvaluateSection, *, while_training: bool = False) -> dict[str, Any]:
    """What the stage `evaluate`, or the samples of a training, depend on besides the completions."""
    from reward_models.named_judges import made_from

    if while_training:
        return {} if section.scoring is None else {"judge": made_from(section.scoring)}
    judges = [made_from(judge) | {"truth": judge.truth} for judge in section.judge]
    return {"judges": judges, "samples_shown": section.samples_shown}


def _source(pairs: PairsSection | None) -> dict[str, Any] | None:
    """What a source adds to a key: its section, and its content unless it is a share of another."""
    if pairs is None:
        return None
    found = pairs.model_dump() | ({"content": fingerprint_source(pairs.path)} if pairs.path else {})
    return found | ({} if pairs.checked is None else {"checked_content": fingerprint_source(pairs.checked.path)})


def describe(config: RunConfig) -> dict[str, Any]:
    """The resolved plan of a run for ``--dry-run``: configuration, stages and their folders."""
    return {
        "config": redact(config.model_dump()),
        "config_digest": digest(redact(config.model_dump()))[:16],
        "stages": {name: str(config.folder / name) for name in plan(config)},
        "world_size": world_size(),
        "python": sys.version.split()[0],
    }
