"""The kernels for AMX, whose tile instructions are carried out by a handler of SIGILL.

On a CPU with AMX, ``LLMJEPA_CPU_ISA=amx python -m pytest tests/ops/test_cpu_attention.py`` runs
them natively.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmjepa_kernels.ops import cpu
from tests.support.build_cpu import ROOT, build_library

CPU_INFO = Path("/proc/cpuinfo")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not cpu.is_available() or "avx512bf16" not in cpu.isas(),
        reason="needs the compiled library and a CPU with AVX512-BF16",
    ),
    pytest.mark.skipif(
        CPU_INFO.exists() and "amx_bf16" in CPU_INFO.read_text(),
        reason="the CPU has AMX: see above",
    ),
]


def test_attention(tmp_path):
    library = build_library(tmp_path, LLMJEPA_CPU_FLAGS="-DLK_EMULATED_AMX")
    emulator = tmp_path / "emulator.so"
    source = ROOT / "tests/support/emulated_amx.cpp"
    flags = ["-std=c++17", "-O3", "-mavx2", "-mfma", "-fPIC", "-shared"]
    subprocess.run(["g++", *flags, source, "-o", emulator], check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:faulthandler"]  # whose handler would take the place of the emulator's
    run = subprocess.run(
        [*command, "tests/ops/test_cpu_attention.py", "-k", "(amx and bfloat16) or random"],
        cwd=ROOT,
        env={
            **os.environ,
            cpu.ISA_VARIABLE: "amx",
            cpu.LIBRARY_VARIABLE: str(library),
            "LD_PRELOAD": str(emulator),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert re.search(r"^\d+ passed", run.stdout, re.MULTILINE), run.stdout
    (products,) = re.findall(r"^carried out (\d+) products of tiles", run.stderr, re.MULTILINE)
    assert int(products) > 10_000
