"""The work of `align eval benchmarks`: benchmark suites before and after, through lm-evaluation-harness.

OUTPUT/benchmarks/<policy>-<digits>/results.json            as lm_eval writes it
OUTPUT/benchmarks/<policy>-<digits>/samples_<task>.jsonl    one line per document, as lm_eval writes them
"""

import importlib.metadata
import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from align.commands.evaluation_report import check_report_folder, publish
from align.errors import AlignError, ConfigError, DataError
from align.evaluation.benchmarks import compare_suites
from align.evaluation.harness_results import read_suite
from align.evaluation.policies import REFERENCE, Policy, find_reference, parse_policies
from align.io.console import log
from align.io.files import write_json
from align.io.hashing import digest, fingerprint_source
from align.io.stage import run_stage
from align.models.folders import fingerprint_model
from align.stats import interval

PACKAGE = "lm_eval"
INSTALL = "pip install 'margin-align[benchmarks]'"
FOLDER, RESULTS = "benchmarks", "results.json"
KEPT = ("doc_id", "doc", "target", "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash")
"""Fields of a line of samples, besides the metrics; its prompts and raw responses are left out."""
KEY_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Benchmarks:
    """What is measured, in the harness's own terms."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    """None: the number of the task."""
    limit: int | None = None
    """Documents of each task, its first ones; None: all."""
    apply_chat_template: bool = False
    include_path: Path | None = None
    """Folder with own task files."""
    batch_size: int = 8

    def made_from(self) -> dict[str, Any]:
        """What determines the results."""
        files = None if self.include_path is None else fingerprint_source(str(self.include_path))
        return {
            "tasks": list(self.tasks),
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "apply_chat_template": self.apply_chat_template,
            "include": files,
            "lm_eval": importlib.metadata.version(PACKAGE),
        }


def measure(items: Sequence[str], reference: str | None, benchmarks: Benchmarks, output: Path) -> None:
    """Run benchmarks on policies and their reference, and add the changes to the report of OUTPUT.

    Args:
        items: policies, ``NAME=FOLDER`` or ``FOLDER``.
        reference: the model before training; None: the one that the policies' adapters were trained on.
        benchmarks: tasks and how they are asked.
        output: folder of the evaluation; finished models are not measured again.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, or has no such task.
        DataError: the data of a task cannot be loaded.
        ModelError: a policy cannot be loaded.
    """
    started = time.monotonic()
    policies = parse_policies(items)
    everyone = [find_reference(policies, reference), *policies]
    check_report_folder(output)
    _check_tasks(benchmarks)
    folders = {policy.name: _measured(policy, benchmarks, output) for policy in everyone}
    asked = {"tasks": ", ".join(benchmarks.tasks), **_settings(benchmarks)}
    _compare(folders, output, {policy.name: policy.model for policy in everyone}, asked, started)


def read(items: Sequence[str], reference: str, output: Path) -> None:
    """Compare results that lm_eval has written, and add the changes to the report of OUTPUT.

    Args:
        items: results of policies, ``NAME=PATH``: a results file, or a folder that holds one.
        reference: the results of the model before training, file or folder.
        output: folder of the evaluation.

    Raises:
        DataError: a file is no results file, or two were not measured in the same way.
    """
    started = time.monotonic()
    paths = {REFERENCE: reference} | {policy.name: policy.model for policy in parse_policies(items)}
    check_report_folder(output)
    _compare({name: Path(path) for name, path in paths.items()}, output, paths, {}, started)


def _compare(
    paths: Mapping[str, Path], output: Path, models: Mapping[str, str], asked: Mapping[str, Any], started: float
) -> None:
    suites = {name: read_suite(path) for name, path in paths.items()}
    before = suites.pop(REFERENCE)
    found = {
        name: compare_suites(before, after, names=(str(paths[REFERENCE]), str(paths[name])))
        for name, after in suites.items()
    }
    run = {
        "command": shlex.join(["align", *sys.argv[1:]]),
        "policies": dict(models),
        **asked,
        "seconds": round(time.monotonic() - started, 1),
    }
    section = {"policies": found, "run": run}
    output.mkdir(parents=True, exist_ok=True)
    publish(output, {"benchmarks": section}, section)
    for name, numbers in found.items():
        if numbers["mean"] is not None:
            log.info("%s: mean change over %d benchmarks %s", name, numbers["tasks"], interval(numbers["mean"]))


def _settings(benchmarks: Benchmarks) -> dict[str, Any]:
    shots = "each task's own" if benchmarks.num_fewshot is None else benchmarks.num_fewshot
    documents = "all" if benchmarks.limit is None else f"the first {benchmarks.limit} of each task"
    return {
        "shots": shots,
        "documents": documents,
        "chat_template": benchmarks.apply_chat_template,
        "lm_eval": importlib.metadata.version(PACKAGE),
    }


def _manager(benchmarks: Benchmarks) -> Any:
    from lm_eval.tasks import TaskManager

    include = None if benchmarks.include_path is None else str(benchmarks.include_path)
    return TaskManager(include_path=include)


def _check_tasks(benchmarks: Benchmarks) -> None:
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError("lm-evaluation-harness is not installed", code="benchmark-package", hint=INSTALL)
    if not benchmarks.tasks:
        raise ConfigError("--task: missing", code="benchmark-task", hint="--task hellaswag --task arc_easy")
    folder = benchmarks.include_path
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--include-path: found no folder {folder}", code="benchmark-task")
    known = _manager(benchmarks).all_tasks
    for task in benchmarks.tasks:
        if task not in known:
            near = ", ".join(get_close_matches(task, known, 3))
            raise ConfigError(
                f"--task: found no task {task}" + f", expected one like {near}" * bool(near),
                code="benchmark-task",
                hint="`lm_eval ls tasks` lists them",
            )


def _measured(policy: Policy, benchmarks: Benchmarks, output: Path) -> Path:
    """The folder with the results of a policy."""
    inputs = {"model": fingerprint_model(policy.model), **benchmarks.made_from()}
    folder = output / FOLDER / f"{policy.name}-{digest(inputs)[:KEY_DIGITS]}"

    def work(target: Path) -> None:
        results = _evaluate(policy.model, benchmarks)
        for task, rows in results.pop("samples", {}).items():
            kept = [json.dumps({key: row[key] for key in (*KEPT, *row["metrics"])}, default=str) for row in rows]
            target.mkdir(parents=True, exist_ok=True)
            (target / f"samples_{task}.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
        chosen = {"results", "group_subtasks", "versions", "n-shot", "higher_is_better", "config", "n-samples"}
        found = {key: value for key, value in results.items() if key in chosen}
        found["chat_template"] = benchmarks.apply_chat_template
        write_json(target / RESULTS, json.loads(json.dumps(found, default=str)))

    run_stage(f"benchmarks of {policy.name}", folder, inputs, work)
    return folder


def _evaluate(model: str, benchmarks: Benchmarks) -> dict[str, Any]:
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from align.models.loading import load_policy, load_tokenizer, place

    class Loaded(HFLM):
        """A model that is loaded already."""

        def get_model_info(self) -> dict[str, Any]:
            """Nothing: the harness would ask the hub for the model's revision."""
            return {}

    policy = place(
        load_policy(model, dtype="float32"), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ).eval()
    with _harness_problems(benchmarks):
        return simple_evaluate(
            model=Loaded(pretrained=policy, tokenizer=load_tokenizer(model), batch_size=benchmarks.batch_size),
            tasks=list(benchmarks.tasks),
            num_fewshot=benchmarks.num_fewshot,
            limit=benchmarks.limit,
            apply_chat_template=benchmarks.apply_chat_template,
            task_manager=_manager(benchmarks),
            log_samples=True,
        )


@contextmanager
def _harness_problems(benchmarks: Benchmarks) -> Iterator[None]:
    """Turn an error of the harness, most often data that it cannot download, into one message."""
    try:
        yield
    except AlignError:
        raise
    except Exception as error:
        raise DataError(
            f"benchmarks {', '.join(benchmarks.tasks)}: {type(error).__name__}: {' '.join(str(error).split())[:400]}",
            code="benchmark-run",
            hint="the harness downloads the data of its tasks from the hub; own tasks: --include-path",
        ) from error
