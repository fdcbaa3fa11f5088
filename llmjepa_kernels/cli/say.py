"""Lines on standard error, said once by several processes; imports nothing that takes time."""

from __future__ import annotations

import os
import sys


def is_first_process() -> bool:
    """Whether torchrun has started no process before this one."""
    return os.environ.get("RANK", "") in ("", "0")


def say(text: str) -> None:
    """A line about what begins; from the first of several processes."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)
