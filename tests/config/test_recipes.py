"""Recipes for clusters: manifests fit their schema, commands in them parse, versions are those that were tested."""

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from align.config import load_config
from align.run.checks import check_config
from tests.test_docs import parse

ROOT = Path(__file__).parents[2]
SCORE = ROOT / "configs" / "kuberay" / "score.yaml"
SCHEMA = json.loads((ROOT / "tests" / "kuberay" / "rayjob.json").read_text())


@pytest.fixture
def job() -> dict[str, Any]:
    return dict(yaml.safe_load(SCORE.read_text()))


def test_the_ray_job_fits_the_schema_of_kuberay(job: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(job)
    pods = [job["spec"]["rayClusterSpec"]["headGroupSpec"], *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    for pod in pods:
        spec = pod["template"]["spec"]
        claims = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]} <= claims


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.entrypont", "align"),
        ("spec.backoffLimit", "two"),
        ("spec.rayClusterSpec.headGroupSpec", {"rayStartParams": {}}),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers", [{"image": "x"}]),
    ],
)
def test_the_schema_finds_mistakes(job: dict[str, Any], path: str, value: Any) -> None:
    changed = copy.deepcopy(job)
    *places, last = path.split(".")
    at = changed
    for place in places:
        at = at[place]
    at[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(changed)


def test_what_the_ray_job_runs(job: dict[str, Any]) -> None:
    """Its command is one of `align`, on the version of Ray that was tested, with no more of a worker than a pod has."""
    found = parse(job["spec"]["entrypoint"])
    assert found["output"] == Path("/shared/scored")
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None and job["spec"]["rayClusterSpec"]["rayVersion"] == pinned[1]
    (worker,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    has = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    address, *asked = found["cluster"].split(",")
    wants = dict(part.split("=") for part in asked)
    assert address == "auto"
    assert int(wants["gpus"]) <= int(has["nvidia.com/gpu"]) and int(wants["cpus"]) <= int(has["cpu"])


def test_the_training_takes_what_the_ray_job_leaves() -> None:
    config = load_config(ROOT / "configs" / "multi_node.yaml")
    check_config(config)
    assert config.pairs is not None and config.pairs.path == "/shared/scored/pairs.parquet"
    assert config.train is not None and config.train.pairs_per_step is not None
    batch = config.train.trainer["per_device_train_batch_size"]
    for processes in (1, 8, 16):
        assert config.train.pairs_per_step % (batch * processes) == 0


def test_the_batch_script_is_a_script() -> None:
    """What it does is in tests/slow/test_slurm.py."""
    bash = shutil.which("bash")
    assert bash is not None
    script = ROOT / "configs" / "slurm" / "train.sbatch"
    assert subprocess.run([bash, "-n", str(script)], check=False).returncode == 0
    text = script.read_text()
    (notice,) = re.findall(r"--signal=B:USR1@(\d+)", text)
    (grace,) = re.findall(r"SHUTDOWN_TIMEOUT=\$\{GRACE:-(\d+)\}", text)
    assert int(grace) < int(notice)
