"""Runs the tests of the CPU kernels on a library built with AddressSanitizer and UBSan.

    python -m tests.support.sanitize_cpu [pytest arguments instead of the usual selection]

Any report of a sanitizer fails the run. Needs GCC (or CXX) with libasan and libubsan.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tests.support.build_cpu import ROOT, build_library

# Every kernel, instruction set and dtype, but not every case of it.
SELECTED = (
    "head_dims or options or ragged or extreme or strides or openmp or finite or loss or refused"
)
SELECTED += " or (tubes and cpu)"
TESTS = [f"tests/ops/test_{name}.py" for name in ("cpu_attention", "cpu_loss", "tubes")]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all"


def main() -> int:
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX").split()[0]
    runtimes = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    with tempfile.TemporaryDirectory() as build:
        flags = f"{SANITIZE} -O2 -g -fno-omit-frame-pointer"
        library = build_library(Path(build), LLMJEPA_CPU_FLAGS=flags, LDFLAGS=SANITIZE)
        environment = {
            **os.environ,
            "LLMJEPA_CPU_LIBRARY": str(library),
            # The sanitizers' runtimes must come before everything that Python loads, and
            # Python itself is not free of leaks.
            "LD_PRELOAD": ":".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        selection = sys.argv[1:] or ["-k", SELECTED]
        return subprocess.run([*command, *selection], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
