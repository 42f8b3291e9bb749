"""The command line under `accelerate launch`, one process or several, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(processes: int, module: str, *arguments: str, launcher: Path | None = None) -> list[str]:
    """``module`` in that many processes; 1 starts it as it is."""
    kind = ["--multi_gpu"] if launcher is None else ["--config_file", str(launcher)]
    launch = ["-m", "accelerate.commands.launch", *kind, "--num_machines", "1", "--main_process_port", "0"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", str(processes)]
    return [sys.executable, *(launch if processes > 1 else []), "-m", module, *arguments]


def environment() -> dict[str, str]:
    """One thread a process and no GPU."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def launched(
    processes: int,
    *arguments: str,
    cwd: Path,
    module: str = "align.cli",
    launcher: Path | None = None,
    timeout: float = 1800,
) -> subprocess.CompletedProcess[str]:
    """Run ``module`` in that many processes; each has one thread and no GPU.

    Args:
        processes: 1 starts the module as it is.
        arguments: of the module.
        cwd: working directory.
        module: ``align.cli``, or one of the tests' that does something to it first.
        launcher: accelerate's configuration; plain data parallelism where None.
        timeout: seconds until the test fails.
    """
    return subprocess.run(
        command(processes, module, *arguments, launcher=launcher),
        cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip
