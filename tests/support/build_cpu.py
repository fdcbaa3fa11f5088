"""Builds the CPU library in another way than the package's own, to test that one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build_library(build: Path, **environment: str) -> Path:
    """The library that setup.py builds in an empty directory, with these environment variables."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--force"]
    command += [f"--build-lib={build}", f"--build-temp={build}/temp"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)
    library = Path(build, "llmjepa_kernels/ops/_cpu.so")
    if not library.exists():  # setup.py goes on without it, and the tests would be skipped
        raise RuntimeError(f"the kernels could not be compiled with {environment}")
    return library
