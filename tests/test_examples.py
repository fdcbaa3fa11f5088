"""The examples run as a user would run them, and what they print is what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEXT_TOKEN = r"next-token loss (\d+\.\d+)"
DIFFERENCE = r"difference.*: (\d\.\de[-+]\d\d)$"
EXAMPLES = {
    # Each with a number that it prints repeatedly, and what must hold of these.
    "hf_trainer": (r"'ntp_loss': '?(\d+\.\d+)", lambda losses: losses[-1] < losses[0] - 1),
    "lora": (NEXT_TOKEN, lambda losses: losses[-1] < losses[0] - 0.5),
    "preference_pairs": (DIFFERENCE, lambda errors: len(errors) == 1 and errors[0] < 1e-5),
    "pytorch_loop": (NEXT_TOKEN, lambda losses: losses[-1] < losses[0] - 0.5),
    "tree_attention": (DIFFERENCE, lambda errors: len(errors) == 2 and max(errors) < 1e-5),
}


def test_every_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    pattern, holds = EXAMPLES[name]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    numbers = [float(n) for n in re.findall(pattern, done.stdout, re.MULTILINE)]
    assert holds(numbers), done.stdout
