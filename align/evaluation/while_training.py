"""Samples of a policy while it trains: what it writes for held-out prompts, judged against what it wrote at the start.

Sample i of a prompt has the same random numbers in every step, so the start compared with itself is a tie everywhere,
and small changes of the policy change few texts.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from align.config import EvalSamplesSection
from align.data.text import plain
from align.distributed import all_gather_objects, from_main_process, process_rank, world_size
from align.evaluation.rewards import gain_per_root_kl
from align.evaluation.text_statistics import repetition
from align.generation.sampling_job import KL_BATCH_TOKENS
from align.generation.transformers_engine import TransformersEngine
from align.generation.types import Completion, Sampling, as_completion, prompt_keys
from align.io.files import read_json, write_json, write_text
from align.models.completion_logps import completion_kl
from align.models.tokenization import encode_prompt
from align.stats import mean_interval, share_interval
from align.training.held_out import ALL, PARTS
from align.training.held_out_trainer import HeldOutTrainer

Row = dict[str, Any]
PROMPTS = "prompts.json"
"""File with the texts of the prompts, in the order of their numbers."""
COLUMNS = ("prompt", "sample", "text", "tokens", "finish_reason", "reward", "kl")
"""Columns of a sample on disk; ``prompt`` is the number of the prompt."""


class Judge(Protocol):
    """Gives a reward to a (prompt, completion)."""

    name: str

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """Reward of each, float64 [N]."""


@dataclass(frozen=True, slots=True)
class SampledPrompts:
    """Held-out prompts, and which of them choose a checkpoint."""

    prompts: Sequence[Any]
    """Text or messages, each once."""
    choosing: np.ndarray | None = None
    """Whether a prompt is of the half that chooses, bool [N]; None if nothing is chosen."""


class SamplesWhileTraining:
    """Samples the policy of a trainer by the transformers engine, judges the samples and compares them with the start.

    The samples of a step go into ``step-<step>.jsonl``, one per line; those of a call that was stopped into a file
    per process, which the next call on the same weights goes on with.

    Args:
        section: how it is sampled.
        prompts: what for.
        judge: makes the judge, which is called once; None: only texts and KL are measured.
        seed: of the samples.
    """

    def __init__(
        self, section: EvalSamplesSection, prompts: SampledPrompts, judge: Callable[[], Judge] | None, seed: int
    ) -> None:
        self.section = section
        self.every = section.every
        self.prompts = prompts
        self._make_judge = judge
        self._judge: Judge | None = None
        self._engine: TransformersEngine | None = None
        self._seed = seed
        self._keys = prompt_keys(prompts.prompts)

    def __call__(self, trainer: HeldOutTrainer, step: int, state: str, folder: Path) -> dict[str, Any]:
        """See ``align.training.held_out_trainer.Sampler``."""
        start = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        if process_rank() == 0:
            write_json(folder / PROMPTS, [plain(prompt) for prompt in self.prompts.prompts])
        unfinished = f"step-{step}.{state}"
        done = from_main_process(lambda: sorted(_read_parts(folder, unfinished)))
        self._sample(trainer, sorted({*range(len(self._keys))} - {*done}), folder, unfinished)
        trainer.accelerator.wait_for_everyone()
        groups = from_main_process(lambda: _read_parts(folder, unfinished))
        rows = [row for k in sorted(groups) for row in groups[k]]
        kl = self._kl(trainer, rows)

        def finish() -> dict[str, Any]:
            judged = self._judged([{**row, "kl": value} for row, value in zip(rows, kl, strict=True)])
            lines = (json.dumps({key: row[key] for key in COLUMNS}, ensure_ascii=False) + "\n" for row in judged)
            write_text(folder / f"step-{step}.jsonl", "".join(lines))
            record = self.record(judged, judged if step == 0 else read_samples(folder / "step-0.jsonl"))
            for part in folder.glob("*.part-*"):
                part.unlink()
            judge = None if self._judge is None else self._judge.name
            return record | {"judge": judge, "seconds": time.monotonic() - start}

        return from_main_process(finish)

    def _sample(self, trainer: HeldOutTrainer, left: list[int], folder: Path, unfinished: str) -> None:
        """Sample the share of this process of the prompts that are left, and append each prompt as it is done."""
        own = left[process_rank() :: world_size()]
        if not own:
            return
        section = self.section
        if self._engine is None:
            model = trainer.accelerator.unwrap_model(trainer.model)
            self._engine = TransformersEngine(model, trainer.processing_class, batch_size=section.batch_size)
        sampling = Sampling(
            section.max_new_tokens, section.temperature, section.top_p, n=section.n, seed=self._seed,
            engine="transformers", batch_size=section.batch_size,
        )  # fmt: skip
        asked = [self.prompts.prompts[k] for k in own]
        with (folder / f"{unfinished}.part-{process_rank()}").open("a", encoding="utf-8") as stream:
            stream.write("\n" if stream.tell() else "")  # a killed process may have left a part of a line
            for k, completions in self._engine.stream(asked, sampling, [self._keys[k] for k in own]):
                rows = [_row(own[k], sample, one) for sample, one in enumerate(completions)]
                stream.write(json.dumps({"prompt": own[k], "rows": rows}) + "\n")
                stream.flush()

    def _kl(self, trainer: HeldOutTrainer, rows: Sequence[Row]) -> list[float | None]:
        """Exact KL of each sample, nats; None under top-p, which is another distribution than the policy's."""
        if self.section.top_p < 1:
            return [None] * len(rows)
        own = range(process_rank(), len(rows), world_size())
        tokenizer = trainer.processing_class
        values = completion_kl(
            trainer.accelerator.unwrap_model(trainer.model), trainer.sampling_reference,
            [encode_prompt(self.prompts.prompts[rows[k]["prompt"]], tokenizer) for k in own],
            [rows[k]["ids"] for k in own], batch_tokens=KL_BATCH_TOKENS, pad_token_id=tokenizer.pad_token_id,
            temperature=self.section.temperature,
        )  # fmt: skip
        found = dict(all_gather_objects(list(zip(own, values.tolist(), strict=True))))
        return [found[k] for k in range(len(rows))]

    def _judged(self, rows: list[Row]) -> list[Row]:
        """The samples with the judge's reward."""
        if self._make_judge is None or not rows:
            return [row | {"reward": None} for row in rows]
        if self._judge is None:
            self._judge = self._make_judge()
        prompts = [self.prompts.prompts[row["prompt"]] for row in rows]
        texts = [as_completion(prompt, row["text"]) for prompt, row in zip(prompts, rows, strict=True)]
        rewards = self._judge.score(prompts, texts)
        return [row | {"reward": float(reward)} for row, reward in zip(rows, rewards, strict=True)]

    def record(self, rows: Sequence[Row], start: Sequence[Row]) -> dict[str, Any]:
        """Metrics of the samples of a step, of each half of the prompts where something is chosen, and of all.

        Args:
            rows: the samples.
            start: those of the policy before its first step.
        """
        choosing, number = self.prompts.choosing, len(self._keys)
        parts = {} if choosing is None else {PARTS[0]: choosing, PARTS[1]: ~choosing}
        found: dict[str, Any] = {}
        for name, part in (parts | {ALL: np.ones(number, dtype=bool)}).items():
            kept = [[row for row in table if part[row["prompt"]]] for table in (rows, start)]
            found[name] = sample_metrics(*kept, ratio=self.section.temperature == 1) if kept[0] else {}
        tokens = sum(row["tokens"] for row in rows)
        return found | {"prompts": number, "samples": len(rows), "tokens": tokens}


def sample_metrics(rows: Sequence[Row], start: Sequence[Row], *, ratio: bool) -> dict[str, Any]:
    """Metrics of samples by name, each an estimate with a 95% interval over prompts, or None where it is not defined.

    A prompt counts once, with the mean of its samples. Its win rate is the share of all pairs of one of its samples and
    one of the start's in which the judge's reward of the former is higher; equal rewards count half.

    Args:
        rows: the samples of a step.
        start: the samples of the start for the same prompts.
        ratio: whether gain / sqrt(2 KL) is defined: the samples are of the policy itself.
    """
    prompts = sorted({row["prompt"] for row in rows} & {row["prompt"] for row in start})
    now, before = ({k: [row for row in table if row["prompt"] == k] for k in prompts} for table in (rows, start))

    def means(of: Callable[[Row], float]) -> np.ndarray:
        return np.array([np.mean([of(row) for row in now[k]]) for k in prompts])

    found: dict[str, Any] = {
        "tokens": mean_interval(means(lambda row: row["tokens"])).to_dict(),
        "repetition": share_interval(means(lambda row: repetition(row["text"]))).to_dict(),
        "unfinished": share_interval(means(lambda row: float(row["finish_reason"] == "length"))).to_dict(),
        "empty": share_interval(means(lambda row: float(not row["text"].strip()))).to_dict(),
    }
    same = [float(np.mean([row["text"] == other["text"] for row, other in zip(now[k], before[k], strict=True)]))
            for k in prompts]  # fmt: skip
    found["same_text"] = share_interval(same).to_dict()
    kl = None if rows[0]["kl"] is None else means(lambda row: row["kl"])
    found |= {} if kl is None else {"kl": mean_interval(kl).to_dict()}
    if rows[0]["reward"] is None:
        return found
    gain = means(lambda row: row["reward"]) - np.array([np.mean([row["reward"] for row in before[k]]) for k in prompts])
    rewards = {k: [np.array([row["reward"] for row in table[k]]) for table in (now, before)] for k in prompts}
    wins = [float((0.5 + 0.5 * np.sign(np.subtract.outer(*rewards[k]))).mean()) for k in prompts]
    found["reward"] = mean_interval(means(lambda row: row["reward"])).to_dict()
    found["gain"] = mean_interval(gain).to_dict()
    found["win_rate"] = share_interval(wins).to_dict()
    per_root = gain_per_root_kl(gain, kl) if kl is not None and ratio else None
    found["gain_per_root_kl"] = per_root and per_root.to_dict()
    return found


def read_samples(file: Path) -> list[Row]:
    """The samples of a step."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def shown_samples(folder: Path, count: int) -> list[dict[str, Any]]:
    """What the policy wrote for the first prompts over the training: the first sample of each step, for a page.

    Args:
        folder: of the samples; without any, nothing is shown.
        count: prompts to show, at most.

    Returns:
        ``[{"prompt", "steps": [{"step", "text", "reward", "finish_reason"}]}]``, plain JSON values.
    """
    prompts = read_json(folder / PROMPTS) if (folder / PROMPTS).exists() else []
    files = {int(file.stem.rsplit("-", 1)[1]): file for file in folder.glob("step-*.jsonl")}
    first = {step: [row for row in read_samples(file) if not row["sample"]] for step, file in sorted(files.items())}
    return [
        {
            "prompt": prompts[k],
            "steps": [
                {"step": step} | {name: row[name] for name in ("text", "reward", "finish_reason")}
                for step, rows in first.items()
                for row in rows
                if row["prompt"] == k
            ],
        }
        for k in range(min(count, len(prompts)))
    ]


def _row(prompt: int, sample: int, one: Completion) -> Row:
    return {
        "prompt": prompt, "sample": sample, "text": one.text, "ids": one.token_ids, "tokens": len(one.token_ids),
        "finish_reason": one.finish_reason,
    }  # fmt: skip


def _read_parts(folder: Path, unfinished: str) -> dict[int, list[Row]]:
    """Number of a prompt -> its samples, of the prompts that a stopped call has finished on these weights."""
    found: dict[int, list[Row]] = {}
    for file in sorted(folder.glob(f"{unfinished}.part-*")):
        for line in file.read_text(encoding="utf-8").split("\n"):
            with suppress(ValueError):  # a part of a line, or none
                entry = json.loads(line)
                found[entry["prompt"]] = entry["rows"]
    return found
