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
NEEDS = {"trl_sft": "trl", "lightning_module": "lightning"}  # of the extra `stacks`
EXAMPLES = {
    # Each with a number that it prints repeatedly, and what must hold of these.
    "accelerate_loop": (NEXT_TOKEN, lambda losses: losses[-1] < losses[0] - 0.5),
    "hf_trainer": (r"'ntp_loss': '?(\d+\.\d+)", lambda losses: losses[-1] < losses[0] - 1),
    "lightning_module": (NEXT_TOKEN, lambda losses: losses[-1] < losses[0] - 0.5),
    "lora": (NEXT_TOKEN, lambda losses: losses[-1] < losses[0] - 0.5),
    "preference_pairs": (DIFFERENCE, lambda errors: len(errors) == 1 and errors[0] < 1e-5),
    "pytorch_loop": (NEXT_TOKEN, lambda losses: losses[-1] < losses[0] - 0.5),
    "tree_attention": (DIFFERENCE, lambda errors: len(errors) == 2 and max(errors) < 1e-5),
    "trl_sft": (r"'ntp_loss': '?(\d+\.\d+)", lambda losses: losses[-1] < losses[0] - 1),
}


def test_every_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["torch.distributed.run", "--nproc-per-node=2"], ["accelerate.commands.launch"]]
)
def test_accelerate_loop_is_launched(launcher):
    check("accelerate_loop", "-m", *launcher)


def check(name, *launcher):
    pattern, holds = EXAMPLES[name]
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / f"{name}.py")],
        env=os.environ | alone | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    numbers = [float(n) for n in re.findall(pattern, done.stdout, re.MULTILINE)]
    assert holds(numbers), done.stdout
