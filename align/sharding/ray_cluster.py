"""The shards of a table on the workers of a Ray cluster, each sent there, worked on and brought back.

Ray starts and places the workers; what Ray's own retries do not give is here: a worker that is lost is replaced where
there is room, and its shard goes to whoever is free, so that no shard waits for a machine that is gone. Shards travel
as Parquet files through the process that asked for them, so the workers need no shared disk for them; the models need
names or paths that every machine knows.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from align.config import ClusterSection
from align.errors import AlignError, EnvironmentProblem
from align.io.console import log, progress
from align.sharding.jobs import Job, decode, encode

PATIENCE_SECONDS = 60.0
"""So long nothing may happen, no worker having started, before the user is told."""
LOSSES = 3
"""So many workers a shard may lose before it is taken for the cause."""
KNOCK_SECONDS = 10.0
SAID = 200
"""Characters of Ray's own words in a message."""


class Worker:
    """What runs in a process of the cluster."""

    def __init__(self, job: Job, folder: str, threads: int) -> None:
        self.job, self.threads = job, threads
        if Path(folder).is_dir():  # so that the paths that the user gave mean the same here
            os.chdir(folder)
        self.work: Callable[[Dataset], Dataset] | None = None

    def start(self) -> None:
        """Load the model, with as many threads as there are CPUs for a worker, whatever the environment says."""
        import torch

        torch.set_num_threads(self.threads)
        self.work = self.job.start()

    def __call__(self, shard: bytes) -> bytes:
        """A shard's result."""
        assert self.work is not None
        return encode(self.work(decode(shard)))


def map_on_cluster(
    job: Job,
    shards: Sequence[int],
    rows: Callable[[int], Dataset],
    cluster: ClusterSection,
    keep: Callable[[int, bytes], object],
    *,
    what: str,
) -> None:
    """Work on all shards; ``keep`` gets each result once, in any order.

    Args:
        job: pickled and started once in each worker.
        shards: their numbers.
        rows: of a shard; called for when it is sent.
        cluster: where, and how many workers.
        keep: number and Parquet file of a finished shard.
        what: shown to the user meanwhile.

    Raises:
        AlignError: raised by the job in a worker.
        EnvironmentProblem: Ray is not installed, the cluster cannot be reached, has no room or fails, or workers are
            lost on the same shard again and again.
    """
    ray = _connected(cluster)
    try:
        pool = _Pool(ray, job, cluster, len(shards))
        for number, result in progress(pool.results(shards, rows), what=what, total=len(shards), unit="shards"):
            keep(number, result)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise EnvironmentProblem(
            f"cluster {cluster.address}: {type(error).__name__}: {' '.join(str(error).split())[:SAID]}",
            code="cluster-failed",
            hint="finished shards are kept: mend the cluster and give the same command again",
        ) from None
    finally:
        ray.shutdown()


class _Pool:
    """Workers of one job and the shards that they have in hand."""

    def __init__(self, ray: Any, job: Job, cluster: ClusterSection, shards: int) -> None:
        self.ray, self.cluster = ray, cluster
        self.job = ray.put(job)
        self.kind = ray.remote(num_cpus=cluster.cpus, num_gpus=cluster.gpus)(Worker)
        self.starting: dict[Any, Any] = {}
        self.working: dict[Any, tuple[Any, int]] = {}
        self.idle: list[Any] = []
        room = self._room()
        wanted = cluster.workers or room
        if room < max(1, wanted):
            raise EnvironmentProblem(
                f"cluster {cluster.address}: room for {room} workers of {cluster.cpus:g} CPUs and {cluster.gpus:g} "
                f"GPUs, expected for at least {max(1, wanted)}",
                code="cluster-room",
                hint="ask for fewer or smaller workers: cluster.workers, cluster.cpus, cluster.gpus",
            )
        for _ in range(min(wanted, shards)):
            self._add()

    def _room(self) -> int:
        """Workers that fit on the machines that are alive."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        fits = [node.get("CPU", 0) // self.cluster.cpus for node in nodes]
        if self.cluster.gpus > 0:
            fits = [min(n, node.get("GPU", 0) // self.cluster.gpus) for n, node in zip(fits, nodes, strict=True)]
        return int(sum(fits))

    def _add(self) -> None:
        worker = self.kind.remote(self.job, str(Path.cwd()), max(1, int(self.cluster.cpus)))
        self.starting[worker.start.remote()] = worker

    def results(self, shards: Sequence[int], rows: Callable[[int], Dataset]) -> Any:
        """(number, file) of each shard as it is finished."""
        waiting = list(reversed(shards))
        losses: dict[int | None, int] = dict.fromkeys([None, *shards], 0)
        left = len(waiting)
        while left:
            done, _ = self.ray.wait([*self.starting, *self.working], num_returns=1, timeout=PATIENCE_SECONDS)
            if not done:
                self._complain()
                continue
            worker, number = self.working.pop(done[0], (self.starting.pop(done[0], None), None))
            try:
                result = self.ray.get(done[0])
            except self.ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, AlignError):
                    raise error.cause from None
                raise
            except self.ray.exceptions.RayError as error:
                self._lost(error, number, losses)
                if number is not None:
                    waiting.append(number)
            else:
                self.idle.append(worker)
                if number is None:
                    losses[None] = 0
                else:
                    left -= 1
                    yield number, result
            while waiting and self.idle:
                worker, following = self.idle.pop(), waiting.pop()
                self.working[worker.__call__.remote(encode(rows(following)))] = (worker, following)
            if waiting and not self.starting and not self.working:
                self._add()

    def _lost(self, error: Exception, number: int | None, losses: dict[int | None, int]) -> None:
        """Replace a worker that is gone, where no other is free.

        Raises:
            EnvironmentProblem: too many were lost on this shard, or one after the other while they started.
        """
        said = " ".join(str(error).split())[:SAID]
        where = "while it started" if number is None else f"on the rows from {number} on"
        log.warning("a worker of the cluster was lost %s: %s", where, said)
        losses[number] += 1
        if losses[number] >= LOSSES:
            raise EnvironmentProblem(
                f"cluster {self.cluster.address}: {LOSSES} workers were lost {where}: {said}",
                code="cluster-lost",
                hint="a worker that runs out of memory is the usual cause: make batches smaller",
            )
        if not self.idle:
            self._add()

    def _complain(self) -> None:
        """Nothing has happened for a while.

        Raises:
            EnvironmentProblem: and nothing can.
        """
        if self.working:
            return
        if self._room() == 0:
            raise EnvironmentProblem(
                f"cluster {self.cluster.address}: no machine is left that has room for a worker of "
                f"{self.cluster.cpus:g} CPUs and {self.cluster.gpus:g} GPUs",
                code="cluster-room",
                hint="start the same command again when machines are back; finished shards are kept",
            )
        log.warning("cluster %s: waiting for room for a worker; others may be using it", self.cluster.address)


def _connected(cluster: ClusterSection) -> Any:
    """Ray, connected.

    Raises:
        EnvironmentProblem: not installed, or nothing answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use over the network by default
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its coming default; unset, it warns
    try:
        import ray
    except ImportError:
        raise EnvironmentProblem(
            "cluster: Ray is not installed", code="cluster-missing", hint="pip install 'margin-align[ray]'"
        ) from None
    local, before = cluster.address == "local", signal.getsignal(signal.SIGTERM)
    where: dict[str, Any] = {"include_dashboard": False} if local else {}
    try:
        _knock(os.environ.get("RAY_ADDRESS", "") if cluster.address == "auto" else cluster.address)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR, **where)
    except (OSError, ValueError, RuntimeError) as error:
        raise EnvironmentProblem(
            f"cluster {cluster.address}: cannot be reached ({' '.join(str(error).split())[:SAID]})",
            code="cluster-unreachable",
            hint="start one with `ray start --head`, or use the address `local`",
        ) from None
    if local and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray puts its own in place where it starts a machine
    return ray


def _knock(address: str) -> None:
    """See whether something answers at ``host:port``; Ray itself would try for minutes.

    Raises:
        OSError: nothing does.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
