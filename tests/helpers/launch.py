"""Starting Python anew, alone or as two gloo processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(module, *arguments, killed=False):
    """Run ``python -m module arguments`` to its end, or to the SIGKILL that it is expected to die of."""
    return _run([sys.executable, "-m", module, *map(str, arguments)], -signal.SIGKILL if killed else 0)


def torchrun(logs, module, *arguments):
    """Run a module as two processes on the CPU; ``logs`` is a folder for the launcher's own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--log-dir={logs}"]
    return _run([sys.executable, *launcher, "-m", module, *map(str, arguments)], 0)


def _run(command, expected):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == expected, (
        f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout
