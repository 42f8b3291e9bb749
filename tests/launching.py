"""The command line under `accelerate launch`, one process or several, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launched(
    processes: int, *arguments: str, cwd: Path, module: str = "align.cli", timeout: float = 1800, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``module`` in that many processes; each has one thread and no GPU.

    Args:
        processes: 1 starts the module as it is.
        arguments: of the module.
        cwd: working directory.
        module: ``align.cli``, or one of the tests' that does something to it first.
        timeout: seconds until the test fails.
        environment: more variables.
    """
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--main_process_port", "0"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", module, *arguments]
    full = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        command, cwd=cwd, env=full, capture_output=True, text=True, check=False, timeout=timeout
    )  # fmt: skip
