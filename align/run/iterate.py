"""`align iterate`: rounds of on-policy alignment.

    round r:  prompts of this round -> generate (policy r - 1) -> pairs (scorer) -> train -> policy r

Each step is a stage in ``round-r/``: it is skipped if its inputs have not changed, and resumes where it was stopped.
Every round samples from the policy of the round before, which is also its reference; every prompt is used in one round
only. The policy is optimized for the scorer that makes the pairs, so judge the result by another one.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.commands.build_pairs import METRICS, BuildSettings, build_pairs
from align.commands.evaluation_tables import measure_kl, on_same_prompts, write_completions
from align.commands.generate import GenerateSettings, complete_prompts
from align.config import TrainSection, load_section
from align.config.iterate import BuildSection, IterateConfig
from align.data.prompts import PromptRow, read_prompts, rows_with_system
from align.distributed import process_rank, world_size
from align.errors import ConfigError, DataError, ModelError
from align.evaluation.policies import Policy
from align.generation.engines import choose_engine
from align.generation.types import Sampling
from align.generation.vllm_adapters import check_vllm_adapter
from align.io.console import log
from align.io.files import atomic_folder, read_json, write_json
from align.io.hashing import fingerprint_source
from align.io.stage import run_stage
from align.models.folders import check_model_folder, fingerprint_model
from align.models.message_checks import check_prompts_of
from align.reports.rounds_page import write_rounds_page
from align.stats import interval, mean_interval
from reward_models.loading import LoadOptions
from reward_models.scorers import ScorerSpec

if TYPE_CHECKING:
    from align.training.base.trackers import TrackedRun

SUMMARY = "iterate.json"
PAGE = "report.html"
KL = "kl"
MERGED = "policy"


def load_iterate(path: Path, overrides: list[str] | None) -> IterateConfig:
    """Read the configuration of a YAML file.

    Raises:
        ConfigError: see ``load_config``; or a value of ``pairs`` is out of range; or the training cannot work.
    """
    config = load_section(path, overrides, IterateConfig)
    build_settings(config.pairs)
    if config.pairs.reward_model is not None:
        check_model_folder(config.pairs.reward_model, rewards=True, head=True)
    _check_training(config.train)
    if choose_engine(config.generate.engine)[0] == "vllm":
        check_vllm_adapter(config.train.model)
    return config


def _check_training(train: TrainSection) -> None:
    """Check the training before anything is sampled for it.

    Raises:
        ConfigError: a loss, its parameters, a field of the adapter or the trainer; or `train.trust: auto`.
    """
    from align.run.checks import check_train
    from align.training.adapters import check_merges

    if train.trust is not None:
        raise ConfigError(
            "train.trust: found auto, which rounds do not measure",
            code="config-key",
            hint="leave it out and give slope, trust and strength, as `align trust` finds them",
        )
    watched = ("eval_pairs", "eval_samples", "keep", "early_stopping")
    given = [name for name in watched if getattr(train, name) is not None]
    if given:
        raise ConfigError(
            f"train.{given[0]}: found it in a run of rounds, which hold nothing out while they train",
            code="eval-config",
            hint="leave it out, and evaluate the policies of the rounds with `align eval`",
        )
    check_merges(train)
    check_train(train, {"output_dir": "check"})


def iterate(config: IterateConfig) -> Path:
    """Run every round that is not up to date, write ``iterate.json``, and return the folder of the last policy.

    Raises:
        AlignError: an error that the user can fix; finished stages stay as they are.
    """
    prompts = read_prompts(config.prompts, config.generate.chat_template_kwargs)
    prompts = rows_with_system(prompts, config.generate.system_prompt, config.prompts.path)
    if len(prompts) < config.rounds:
        raise DataError(
            f"{config.prompts.path}: found {len(prompts)} prompts, expected one for each of {config.rounds} rounds",
            code="data-too-few",
            hint="give more prompts, or fewer rounds",
        )
    policy = config.train.model
    check_prompts_of([row.prompt for row in prompts], [policy])
    found = {"name": config.name, "start": policy, "scorer": build_settings(config.pairs).scorer.name}
    summary = []
    for number in range(1, config.rounds + 1):
        root = config.folder / f"round-{number}"
        log.info("round %d of %d: from %s", number, config.rounds, policy)
        own = prompts[number - 1 :: config.rounds]
        before, policy = policy, _round(config, own, policy, root)
        if process_rank() > 0:
            continue
        metrics = {name: read_json(root / name / METRICS) for name in ("generate", "pairs")}
        kl = _kl_to_start(config, own, before, root / KL)
        summary.append({"round": number, "sampled_from": before, "trained": policy, "kl_to_start": kl, **metrics})
        so_far = found | {"rounds": summary}
        write_json(config.folder / SUMMARY, so_far)
        write_rounds_page(config.folder / PAGE, so_far)
        reward = metrics["pairs"]["mean_reward"]
        log.info("round %d: reward of its samples, before training on them: %s", number, interval(reward))
    if process_rank() == 0:
        log.info("look at it: open %s", config.folder / PAGE)
    return Path(policy)


def _kl_to_start(config: IterateConfig, prompts: list[PromptRow], policy: str, folder: Path) -> dict[str, Any] | None:
    """KL(policy || first policy) over the first prompts of a round, an estimate as JSON values; None if not measured.

    The prompts are of the round that samples from the policy, which has not been trained on them.
    """
    start = config.train.model
    if policy == start or not config.kl_prompts or world_size() > 1 or config.train.trusts_remote_code:
        return None
    sampling = replace(_sampling(config), n=1)
    texts = [row.prompt for row in prompts[: config.kl_prompts]]
    kept, _ = on_same_prompts([write_completions(Policy("policy", policy), texts, sampling, folder)])
    (written,) = kept
    return mean_interval(measure_kl(written, Policy("start", start), folder).exact).to_dict()


def _sampling(config: IterateConfig) -> Sampling:
    """The sampling of every round."""
    section = config.generate
    return Sampling(
        section.max_new_tokens, section.temperature, section.top_p, section.n, config.seed,
        engine=section.engine, batch_size=section.batch_size, options=section.options, top_k=section.top_k,
        min_p=section.min_p, stop=tuple(section.stop),
    )  # fmt: skip


def _round(config: IterateConfig, prompts: list[PromptRow], policy: str, root: Path) -> str:
    """Run one round and return the folder of the policy that it trained."""
    complete_prompts(prompts, config.prompts.path, GenerateSettings(policy, _sampling(config)), root / "generate")
    build_pairs(root / "generate", build_settings(config.pairs), root / "pairs")
    (method,) = config.train.methods
    inputs: dict[str, Any] = {
        "pairs": fingerprint_source(str(root / "pairs" / "pairs.parquet")),
        "model": fingerprint_model(policy),
        "settings": config.train.made_from(without={"model"}),
        "seed": config.seed,
    }
    if config.train.reference is not None:
        inputs["reference"] = fingerprint_model(config.train.reference)

    def work(folder: Path) -> None:
        from align.training.base.tracked_runs import tracked_run

        run = tracked_run(config.folder, config.name, root.name)
        _train(config.train.model_copy(update={"model": policy}), method, root / "pairs", folder, config.seed, run)

    run_stage("train", root / "train", inputs, work, collective=True)
    from align.training.train import MODEL

    return str(root / "train" / (MODEL if config.train.peft is None else MERGED))


def _train(config: TrainSection, method: str, pairs: Path, folder: Path, seed: int, run: "TrackedRun") -> None:
    """Train on the pairs; merge an adapter into its base model, from which the next round starts."""
    from align.data.pairs import read_pairs
    from align.models.layout import has_adapter
    from align.models.loading import load_merged_policy, load_tokenizer
    from align.models.model_card import copy_as_merged
    from align.models.template_arguments import different_arguments, write_record
    from align.training.train import HISTORY, MODEL, train_policy

    table = read_pairs(pairs)
    if not (folder / HISTORY).exists():
        train_policy(table, config, method, folder, seed=seed, run=run)
    if config.peft is None or process_rank() > 0:
        return
    with atomic_folder(folder / MERGED) as temporary:
        policy = load_merged_policy(str(folder / MODEL), dtype="float32", trust_remote_code=config.trusts_remote_code)
        if has_adapter(policy):
            raise ModelError(
                f"{folder / MODEL}: its adapter cannot be merged into the model that the next round starts from",
                code="adapter",
                hint="train another kind of adapter (train.peft)",
            )
        policy.save_pretrained(temporary)
        load_tokenizer(config.model).save_pretrained(temporary)
        write_record(different_arguments(table), temporary)
        copy_as_merged(folder / MODEL, temporary)
        if (folder / MERGED).exists():  # left by a process that was killed before the end of the stage
            shutil.rmtree(folder / MERGED)


def build_settings(config: BuildSection) -> BuildSettings:
    """The settings of ``build_pairs`` in the section ``pairs``.

    Raises:
        ConfigError: a value is out of range, or not exactly one scorer is named.
    """
    options = LoadOptions(config.dtype, config.trust_remote_code, config.text_pair)
    scorer = ScorerSpec(config.reward_model, config.judge, config.batch_tokens, config.max_length, options)
    return BuildSettings(scorer, config.mode, config.guard_margin, config.guard_ratio, config.band, config.temperature)
