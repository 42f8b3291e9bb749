"""A Ray cluster gives the same tables as this machine, whatever dies; needs the extra `ray`."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from align.config import ClusterSection
from align.data.pairs import read_pairs
from align.errors import DataError, EnvironmentProblem
from align.sharding.jobs import Job
from align.sharding.shards import map_shards
from scripts.kill.run import run_differences
from tests.helpers.builders import bert_reward, causal, rows
from tests.helpers.cluster_jobs import Deadly, Heavy, Refusing, Squares, finished
from tests.helpers.command_line import jsonl
from tests.helpers.disks import mounted
from tests.helpers.launching import ROOT, environment
from tests.helpers.small_runs import every_stage

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
pytest.importorskip("ray")
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that does no work; tests add machines to it."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield found
    found.shutdown()


def squares(cluster: Any, folder: Path, job: Job, count: int = 40, **fields: Any) -> Dataset:
    """Numbers in shards of five, worked on by the cluster."""
    table = Dataset.from_dict({"value": list(range(count))})
    settings = ClusterSection(address=cluster.address, **fields)
    return map_shards(table, job, folder, size=5, what="squares", cluster=settings).whole()


@pytest.mark.parametrize("machines", [1, 2, 4])
def test_verbs_give_the_same_tables(cluster: Any, tmp_path: Path, machines: int) -> None:
    for _ in range(machines):
        cluster.add_node(num_cpus=1)
    table = [{name: value for name, value in row.items() if name != "margin"} for row in rows(1100)]
    jsonl(tmp_path / "pairs.jsonl", table)
    jsonl(
        tmp_path / "prompts.jsonl",
        [{"id": f"p{k}", "prompt": f"the {row['prompt']}"} for k, row in enumerate(table[:130])],
    )
    causal(tmp_path / "policy")
    causal(tmp_path / "other", seed=1)
    bert_reward(tmp_path / "reward")

    def align(*arguments: str) -> None:
        command = [sys.executable, "-m", "align.cli", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    for name, more in (("here", []), ("there", ["--cluster", cluster.address])):
        align("reward", "score", "pairs.jsonl", "--model", "reward", "--output", f"scored-{name}", *more)
        scored = f"scored-{name}/pairs.parquet"
        options = ["--loss", "madpo", "--limit", "70", "--shown", "1"]
        align("entangle", "report", scored, "--model", "policy", "--output", f"measured-{name}", *options, *more)
        sampling = ["-n", "2", "--max-new-tokens", "6", "--engine", "transformers"]
        align("generate", "prompts.jsonl", "--model", "policy", "--output", f"made-{name}", *sampling, *more)
        sampling = ["--max-new-tokens", "6", "--engine", "transformers", "--reference", "other"]
        judged = ["--judge", "vader", "--prompts", "prompts.jsonl", "--output", f"eval-{name}"]
        align("eval", "reward", "p=policy", *judged, *sampling, *more)
    here, there = (read_pairs(tmp_path / f"scored-{name}") for name in ("here", "there"))
    assert here["id"][:] == there["id"][:] and here.column_names == there.column_names
    assert np.allclose(here["margin"], there["margin"], atol=1e-5)
    measured = [
        Dataset.from_parquet(str(tmp_path / f"measured-{name}" / "measurements" / "entanglement.parquet"))
        for name in ("here", "there")
    ]
    assert measured[0]["id"][:] == measured[1]["id"][:] and measured[0]["verdict"][:] == measured[1]["verdict"][:]
    assert np.allclose(measured[0]["inner"], measured[1]["inner"], atol=1e-5)
    made = [Dataset.from_parquet(str(tmp_path / f"made-{name}" / "completions.parquet")) for name in ("here", "there")]
    assert made[0].to_list() == made[1].to_list() and len(made[0]) == 260
    for kind in ("completions", "log-probs", "scores"):
        tables = [sorted((tmp_path / f"eval-{name}").glob(f"{kind}/*/*.parquet")) for name in ("here", "there")]
        assert tables[0], kind
        for one, other in zip(*tables, strict=True):
            assert one.read_bytes() == other.read_bytes(), one


@pytest.mark.parametrize("machines", [1, 2, 4])
def test_a_filter_keeps_the_same_pairs(cluster: Any, tmp_path: Path, machines: int) -> None:
    """Every score that a cluster can share; a rerun without a cluster in the same folder computes nothing."""
    for _ in range(machines):
        cluster.add_node(num_cpus=1)
    jsonl(tmp_path / "pairs.jsonl", rows(1100))
    jsonl(tmp_path / "known.jsonl", rows(40))
    causal(tmp_path / "policy")
    bert_reward(tmp_path / "reward")

    def align(name: str, *more: str) -> None:
        command = [sys.executable, "-m", "align.cli", "filter", "run", "pairs.jsonl", "--output", name]
        command += [
            "--index",
            "ivf",
            "--embedding-model",
            "reward",
            "--ood-model",
            "reward",
            "--ood-pairs",
            "known.jsonl",
        ]
        command += ["--quality-scorer", "screen", "--quality-scorer", "fluency", "--quality-model", "policy"]
        command += ["--skip", "near_duplicate", "--skip", "duplicate", "--skip", "contradiction", *more]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    align("here")
    align("there", "--cluster", cluster.address)
    found = []
    for table in ("kept", "dropped"):
        here, there = (Dataset.from_parquet(str(tmp_path / name / f"{table}.parquet")) for name in ("here", "there"))
        assert here["id"][:] == there["id"][:] and here.column_names == there.column_names
        for name in ("quality", "diversity", "ood", "importance"):
            values = [np.array(side[name], dtype=np.float64) for side in (here, there)]  # None where a rule came first
            assert np.allclose(*values, atol=1e-5, equal_nan=True), name
        found.append(len(here))
    assert sum(found) == 1100 and min(found) > 100
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "there" / "parts").rglob("*.np?")}
    align("there")
    assert len(written) > 5 and all(file.stat().st_mtime_ns == written[file] for file in written)


def test_a_machine_that_dies(cluster: Any, tmp_path: Path) -> None:
    """No row is lost or duplicated; the remaining machine does the rest."""
    dying = cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    job = Squares(0.5, str(tmp_path / "seen"))

    def kill() -> None:
        while not (tmp_path / "seen").exists():
            time.sleep(0.1)
        cluster.remove_node(dying, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    found = squares(cluster, tmp_path / "shards", job)
    killer.join()
    assert found["square"][:] == [k**2 for k in range(40)]


def test_a_machine_that_comes_later_works_too(cluster: Any, tmp_path: Path) -> None:
    """All machines are gone, then one is back: the work goes on."""
    dying = cluster.add_node(num_cpus=1)
    job = Squares(0.3, str(tmp_path / "seen"))
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(squares, cluster, tmp_path / "shards", job)
        while not finished(tmp_path / "shards"):
            assert not found.done()
            time.sleep(0.1)
        cluster.remove_node(dying, allow_graceful=False)
        time.sleep(1)
        cluster.add_node(num_cpus=1)  # from the main thread, which alone may set the handlers of signals
        assert found.result()["square"][:] == [k**2 for k in range(40)]


def test_the_driver_dies(cluster: Any, tmp_path: Path) -> None:
    """Finished shards are not computed again, on the cluster or without it."""
    cluster.add_node(num_cpus=1)
    code = (
        "from pathlib import Path\nfrom datasets import Dataset\nfrom align.config import ClusterSection\n"
        "from align.sharding.shards import map_shards\nfrom tests.helpers.cluster_jobs import Squares\n"
        "table = Dataset.from_dict({'value': list(range(40))})\n"
        f"job, folder = Squares(0.5, {str(tmp_path / 'seen')!r}), Path({str(tmp_path / 'shards')!r})\n"
        f"cluster = ClusterSection(address={cluster.address!r})\n"
        "map_shards(table, job, folder, size=5, what='squares', cluster=cluster)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], env=environment(), cwd=ROOT)
    while len(finished(tmp_path / "shards")) < 2:
        assert driver.poll() is None
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    files = {start: tmp_path / "shards" / f"{start:08d}.parquet" for start in finished(tmp_path / "shards")}
    kept = {start: file.stat().st_mtime_ns for start, file in files.items()}
    assert 2 <= len(kept) < 8
    table = Dataset.from_dict({"value": list(range(40))})
    made = map_shards(table, Squares(0.0, str(tmp_path / "again")), tmp_path / "shards", size=5, what="squares")
    again = [int(line) for line in (tmp_path / "again").read_text().splitlines()]
    assert sorted([*again, *kept]) == list(range(0, 40, 5))
    assert {start: file.stat().st_mtime_ns for start, file in files.items()} == kept
    assert made.whole()["square"][:] == [k**2 for k in range(40)]


def test_a_worker_that_dies_is_replaced(cluster: Any, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1)
    found = squares(cluster, tmp_path / "shards", Deadly(12, 2, str(tmp_path / "met")))
    assert found["value"][:] == list(range(40))
    assert len((tmp_path / "met").read_text()) == 3


def test_who_is_free_takes_the_shard_of_a_lost_worker(cluster: Any, tmp_path: Path) -> None:
    """Of two workers one is done; it holds the only CPU that is left when the other's machine goes."""
    machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
    seen = tmp_path / "seen"

    def kill() -> None:
        while not seen.exists() or not list(tmp_path.glob("seen-*")):
            time.sleep(0.1)
        time.sleep(1)
        cluster.remove_node(
            next(m for m in machines if (tmp_path / f"seen-{m.node_id}").exists()), allow_graceful=False
        )

    killer = threading.Thread(target=kill)
    killer.start()
    found = squares(cluster, tmp_path / "shards", Squares(1.0, str(seen), slow=5), count=10)
    killer.join()
    assert found["square"][:] == [k**2 for k in range(10)]
    assert len(list(tmp_path.glob("seen-*"))) == 2, "on both machines, one after the other"


def test_a_shard_that_kills_every_worker_is_named(cluster: Any, tmp_path: Path) -> None:
    """The message names its rows; finished shards are kept."""
    cluster.add_node(num_cpus=1)
    with pytest.raises(EnvironmentProblem, match=r"cluster-lost.*3 workers were lost on the rows from 10 on"):
        squares(cluster, tmp_path / "shards", Deadly(12, 99, str(tmp_path / "met")))
    assert 10 not in finished(tmp_path / "shards")


def test_what_a_job_refuses_is_the_message(cluster: Any, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1)
    with pytest.raises(DataError, match=r"model-missing.*no such model"):
        squares(cluster, tmp_path / "shards", Refusing())


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """Of 150 MB, under a name short enough for a socket in it."""
    with tempfile.TemporaryDirectory(prefix="r") as name:
        if os.geteuid() != 0 or not mounted(Path(name), "size=150m", "-t", "tmpfs", "none"):
            pytest.skip("no right to mount a file system here")
        yield Path(name)
        subprocess.run(["umount", "--lazy", name], check=True)  # Ray is still going down


def test_a_full_object_store_is_told(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a full disk behind it; shards that are finished stay."""
    monkeypatch.setenv("RAY_TMPDIR", str(small_disk))
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    found = Cluster(initialize_head=True, head_node_args=head)
    try:
        squares(found, tmp_path / "shards", Squares(0, str(tmp_path / "seen")), count=10)
        with pytest.raises(EnvironmentProblem, match=r"cluster-failed.*OutOfDiskError.*Local disk is full"):
            squares(found, tmp_path / "shards", Heavy(b"0" * 200 * 2**20), count=20)
    finally:
        found.shutdown()
    assert finished(tmp_path / "shards") == [0, 5]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cpus": 8}, "room for 0 workers of 8 CPUs and 0 GPUs, expected room for at least 1"),
        ({"workers": 3}, "room for 1 workers of 1 CPUs and 0 GPUs, expected room for at least 3"),
        ({"gpus": 1}, "room for 0 workers of 1 CPUs and 1 GPUs, expected room for at least 1"),
    ],
)
def test_too_little_room_is_said_before_anything_starts(
    cluster: Any, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    cluster.add_node(num_cpus=1)
    with pytest.raises(EnvironmentProblem, match="cluster-room") as caught:
        squares(cluster, tmp_path / "shards", Squares(0, str(tmp_path / "seen")), **fields)
    assert said in str(caught.value) and not (tmp_path / "seen").exists()


def test_nothing_answers(tmp_path: Path) -> None:
    table = Dataset.from_dict({"value": [1]})
    for address in ("auto", "127.0.0.1:1"):
        with pytest.raises(EnvironmentProblem, match="cluster-unreachable"):
            map_shards(table, Refusing(), tmp_path, size=1, what="x", cluster=ClusterSection(address=address))


def test_a_run_is_the_same_with_a_cluster(tmp_path: Path) -> None:
    """Every kind of stage, under `cluster: {address: local}`; taking the section out makes no stage stale."""
    run = every_stage(tmp_path)

    def align(*more: str) -> str:
        command = [sys.executable, "-m", "align.cli", "run", run.name, *more]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    align("--set", "name=here")
    align("--set", "cluster.address=local", "--set", "name=there")
    here, there = (tmp_path / "runs" / name for name in ("here", "there"))
    assert run_differences(here, there) == []
    stages = [line for line in align("--set", "name=there").splitlines() if line.endswith(": running")]
    assert stages in ([], ["report: running"])


def test_ten_kills_of_a_filter(tmp_path: Path) -> None:
    """Workers, machines and the command itself, in every pass: the tables of a run without a cluster each time."""
    rng = np.random.default_rng(0)
    words = ["good", "bad", "great", "awful", "film", "plot"]
    pairs = [
        row | {"prompt": " ".join(rng.choice(words, size=9)), "id": f"p{k}"} for k, row in enumerate(rows(30) * 300)
    ]
    jsonl(tmp_path / "pairs.jsonl", pairs)
    jsonl(tmp_path / "known.jsonl", rows(40))
    causal(tmp_path / "policy")
    bert_reward(tmp_path / "reward")
    command = [sys.executable, "-m", "scripts.kill.cluster", "--kills", "10", "--output", "kills.json"]
    command += ["--", "pairs.jsonl", "--index", "ivf", "--embedding-model", "reward", "--ood-model", "reward"]
    command += ["--ood-pairs", "known.jsonl", "--quality-scorer", "fluency", "--quality-model", "policy"]
    command += [part for rule in ("near_duplicate", "duplicate", "contradiction") for part in ("--skip", rule)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "kills.json").read_text())
    assert (found["differences"], found["made_again"]) == (0, 0), found["kills"]
    assert all(found["hit"].values()) and sum(found["hit"].values()) >= 8, found["kills"]
