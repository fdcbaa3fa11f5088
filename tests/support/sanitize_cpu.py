"""Runs the tests of the CPU kernels on a library built with AddressSanitizer and UBSan.

    python tests/support/sanitize_cpu.py [pytest arguments instead of the usual selection]

Any report of a sanitizer fails the run. Needs GCC (or CXX) with libasan and libubsan.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
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
        subprocess.run(
            [
                sys.executable,
                "setup.py",
                "-q",
                "build_ext",
                "--force",
                f"--build-lib={build}",
                f"--build-temp={build}/temp",
            ],
            cwd=ROOT,
            env={**os.environ, "LLMJEPA_CPU_FLAGS": flags, "LDFLAGS": SANITIZE},
            check=True,
        )
        library = Path(build, "llmjepa_kernels/ops/_cpu.so")
        if not library.exists():  # setup.py goes on without it, and the tests would be skipped
            raise SystemExit("the kernels could not be compiled with the sanitizers")
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
