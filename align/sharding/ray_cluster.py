"""Map a job over the shards of a table on the workers of a Ray cluster.

Ray starts and places the workers. Ray's retries would wait for a machine that has left; here a lost worker is replaced
on any machine with room, and its shard goes to the next idle worker. Shards and results are sent as Parquet bytes by
the calling process, so workers need no shared disk for them; models need a name or path that is valid on all machines.
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
"""The user gets a warning after this time without a working worker."""
LOSSES = 3
"""A shard that has lost this many workers is taken as the cause."""
CONNECT_SECONDS = 10.0
MESSAGE_CHARACTERS = 200
"""Largest number of characters of Ray's message in a message of ours."""


class _Kept(logging.Handler):
    """Keeps warnings of this program, which a worker would write where nobody reads them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.messages.append(record.getMessage())

    def take(self) -> list[str]:
        """The messages since the last call."""
        taken, self.messages = self.messages, []
        return taken


class Worker:
    """The Ray actor that runs a job; what it warns of goes to the calling process with its results."""

    def __init__(self, job: Job, folder: str, threads: int) -> None:
        self.job, self.threads = job, threads
        if Path(folder).is_dir():  # so that relative paths of the user are valid here
            os.chdir(folder)
        self.work: Callable[[Dataset], Dataset] | None = None
        self.warnings = _Kept()
        log.addHandler(self.warnings)

    def start(self) -> tuple[bytes, list[str]]:
        """Load the model; use one thread per CPU of the worker, regardless of the environment.

        Returns:
            Nothing and the warnings.
        """
        import torch

        torch.set_num_threads(self.threads)
        self.work = self.job.start()
        return b"", self.warnings.take()

    def __call__(self, shard: bytes) -> tuple[bytes, list[str]]:
        """The result of a shard, as Parquet bytes, and the warnings."""
        assert self.work is not None
        return encode(self.work(decode(shard))), self.warnings.take()


def map_on_cluster(
    job: Job,
    shards: Sequence[int],
    rows: Callable[[int], Dataset],
    cluster: ClusterSection,
    keep: Callable[[int, bytes], object],
    *,
    what: str,
) -> None:
    """Process all shards; ``keep`` gets each result once, in any order.

    Args:
        job: pickled and started once in each worker.
        shards: number of each shard.
        rows: gives the rows of a shard; called when the shard is sent.
        cluster: address and workers.
        keep: takes the number and the Parquet bytes of a finished shard.
        what: name of the work in the progress bar.

    Raises:
        AlignError: raised by the job in a worker.
        EnvironmentProblem: Ray is not installed, the cluster cannot be reached, has no room or fails, or ``LOSSES``
            workers are lost on the same shard.
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
            f"cluster {cluster.address}: {type(error).__name__}: {' '.join(str(error).split())[:MESSAGE_CHARACTERS]}",
            code="cluster-failed",
            hint="finished shards are kept: repair the cluster and run the same command again",
        ) from None
    finally:
        ray.shutdown()


class _Pool:
    """Workers of one job and the shards that they are processing."""

    def __init__(self, ray: Any, job: Job, cluster: ClusterSection, shards: int) -> None:
        self.ray, self.cluster = ray, cluster
        self.job = ray.put(job)
        self.kind = ray.remote(num_cpus=cluster.cpus, num_gpus=cluster.gpus)(Worker)
        self.starting: dict[Any, Any] = {}
        self.working: dict[Any, tuple[Any, int]] = {}
        self.idle: list[Any] = []
        self.told: set[str] = set()
        """What workers have warned of; each has the same model, so each would say the same."""
        room = self._room()
        wanted = cluster.workers or room
        if room < max(1, wanted):
            raise EnvironmentProblem(
                f"cluster {cluster.address}: room for {room} workers of {cluster.cpus:g} CPUs and {cluster.gpus:g} "
                f"GPUs, expected room for at least {max(1, wanted)}",
                code="cluster-room",
                hint="ask for fewer or smaller workers: cluster.workers, cluster.cpus, cluster.gpus",
            )
        for _ in range(min(wanted, shards)):
            self._add()

    def _room(self) -> int:
        """Number of workers that fit on the nodes that are alive."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        fits = [node.get("CPU", 0) // self.cluster.cpus for node in nodes]
        if self.cluster.gpus > 0:
            fits = [min(n, node.get("GPU", 0) // self.cluster.gpus) for n, node in zip(fits, nodes, strict=True)]
        return int(sum(fits))

    def _add(self) -> None:
        worker = self.kind.remote(self.job, str(Path.cwd()), max(1, int(self.cluster.cpus)))
        self.starting[worker.start.remote()] = worker

    def results(self, shards: Sequence[int], rows: Callable[[int], Dataset]) -> Any:
        """(number, Parquet bytes) of each shard as it finishes."""
        waiting = list(reversed(shards))
        losses: dict[int | None, int] = dict.fromkeys([None, *shards], 0)
        left = len(waiting)
        while left:
            done, _ = self.ray.wait([*self.starting, *self.working], num_returns=1, timeout=PATIENCE_SECONDS)
            if not done:
                self._warn_of_no_progress()
                continue
            worker, number = self.working.pop(done[0], (self.starting.pop(done[0], None), None))
            try:
                result, warnings = self.ray.get(done[0])
            except self.ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, AlignError):
                    raise error.cause from None
                raise
            except self.ray.exceptions.RayError as error:
                self._handle_loss(error, number, losses)
                if number is not None:
                    waiting.append(number)
            else:
                self._tell(warnings)
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

    def _tell(self, warnings: Sequence[str]) -> None:
        """Log what a worker warned of, each message once."""
        for message in warnings:
            if message not in self.told:
                self.told.add(message)
                log.warning("%s", message)

    def _handle_loss(self, error: Exception, number: int | None, losses: dict[int | None, int]) -> None:
        """Start another worker for a lost one unless a worker is idle.

        Raises:
            EnvironmentProblem: ``LOSSES`` workers were lost on this shard, or in a row while they started.
        """
        reason = " ".join(str(error).split())[:MESSAGE_CHARACTERS]
        where = "while it started" if number is None else f"on the rows from {number} on"
        log.warning("a worker of the cluster was lost %s: %s", where, reason)
        losses[number] += 1
        if losses[number] >= LOSSES:
            raise EnvironmentProblem(
                f"cluster {self.cluster.address}: {LOSSES} workers were lost {where}: {reason}",
                code="cluster-lost",
                hint="the usual cause is a worker that runs out of memory: make batches smaller",
            )
        if not self.idle:
            self._add()

    def _warn_of_no_progress(self) -> None:
        """Warn that nothing has happened for ``PATIENCE_SECONDS``, unless a worker is at work.

        Raises:
            EnvironmentProblem: no node has room for a worker.
        """
        if self.working:
            return
        if self._room() == 0:
            raise EnvironmentProblem(
                f"cluster {self.cluster.address}: no machine is left with room for a worker of "
                f"{self.cluster.cpus:g} CPUs and {self.cluster.gpus:g} GPUs",
                code="cluster-room",
                hint="run the same command again when machines are back; finished shards are kept",
            )
        log.warning(
            "cluster %s: no worker is at work: it still loads, or waits for room that others use",
            self.cluster.address,
        )


def _connected(cluster: ClusterSection) -> Any:
    """The module ``ray``, connected to the cluster.

    Raises:
        EnvironmentProblem: Ray is not installed, or nothing answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use over the network by default
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its next default; Ray warns if it is not set
    try:
        import ray
    except ImportError:
        raise EnvironmentProblem(
            "cluster: Ray is not installed", code="cluster-missing", hint="pip install 'margin-align[ray]'"
        ) from None
    local, before = cluster.address == "local", signal.getsignal(signal.SIGTERM)
    where: dict[str, Any] = {"include_dashboard": False} if local else {}
    try:
        _check_port(os.environ.get("RAY_ADDRESS", "") if cluster.address == "auto" else cluster.address)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR, **where)
    except (OSError, ValueError, RuntimeError) as error:
        raise EnvironmentProblem(
            f"cluster {cluster.address}: cannot be reached ({' '.join(str(error).split())[:MESSAGE_CHARACTERS]})",
            code="cluster-unreachable",
            hint="start one with `ray start --head`, or use the address `local`",
        ) from None
    if local and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray replaces the handler when it starts a local node
    return ray


def _check_port(address: str) -> None:
    """Check that something answers at ``host:port``; Ray itself would try for minutes.

    Raises:
        OSError: nothing answers.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
