"""Arguments that are numbers, checked: an error names the argument and what it should be."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

LARGEST = 3.4028234663852886e38  # finite in float32
SMALLEST = 1.1754943508222875e-38  # of full precision there


def check_whole(name: str, value: Any, *, least: int, most: int = 2**62) -> None:
    """Raises ValueError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, torch.SymInt):  # known to a compiler alone
        return
    try:
        whole = not isinstance(value, bool) and operator.index(value)
    except TypeError:
        whole = False
    if whole is False or not least <= whole <= most:
        above = f"at least {least}" if most == 2**62 else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer, {above}, got {value!r}")


def plain(value: Any) -> Any:
    """A number that was checked as Python's own, also if it is NumPy's."""
    if type(value) in (int, float) or isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    try:
        return operator.index(value)
    except TypeError:  # a float, or an array of one
        return float(value)


def check_finite(name: str, value: Any, *, positive: bool = False) -> None:
    """Raises ValueError unless `value` is a number that float32 holds, and above 0 if asked."""
    if isinstance(value, torch.SymFloat):
        return
    try:  # of a tensor the gradient would be lost, and a GPU would wait
        number = math.nan if isinstance(value, (bool, str, torch.Tensor)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= LARGEST or (positive and number < SMALLEST):
        kind = "positive and finite" if positive else "finite"
        raise ValueError(f"{name} must be a number, {kind} in float32, got {value!r}")
