"""Run a module in one process, or in several under `accelerate launch`, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(processes: int, module: str, *arguments: str, launcher: Path | None = None) -> list[str]:
    """Command that runs ``module`` in ``processes`` processes; a single one needs no launcher."""
    kind = ["--multi_gpu"] if launcher is None else ["--config_file", str(launcher)]
    launch = ["-m", "accelerate.commands.launch", *kind, "--num_machines", "1", "--main_process_port", "0"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", str(processes)]
    return [sys.executable, *(launch if processes > 1 else []), "-m", module, *arguments]


def environment() -> dict[str, str]:
    """Environment with one thread per process and no GPU."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def launched(
    processes: int,
    *arguments: str,
    cwd: Path,
    module: str = "align.cli",
    launcher: Path | None = None,
    timeout: float = 1800,
) -> subprocess.CompletedProcess[str]:
    """Run ``module`` in ``processes`` processes, each with one thread and no GPU.

    Args:
        processes: number of processes; a single one runs without a launcher.
        arguments: command line of the module.
        cwd: working directory.
        module: ``align.cli``, or a module of tests/helpers that changes something first.
        launcher: accelerate's configuration; None for plain data parallelism.
        timeout: seconds until the test fails.
    """
    return subprocess.run(
        command(processes, module, *arguments, launcher=launcher),
        cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip
