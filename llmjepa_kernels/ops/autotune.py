"""LLMJEPA_AUTOTUNE=1: what could run is timed where it is first met, and the fastest remembered."""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch


def is_enabled() -> bool:
    """Whether the user asks for it."""
    return os.environ.get("LLMJEPA_AUTOTUNE") == "1"


_chosen: dict[str, str] = {}


def fastest(kind: str, candidates: Mapping[str, Callable[[], object]]) -> str:
    """The name of the candidate that was fastest on this device when such work was first met.

    The choice is kept in ``$XDG_CACHE_HOME/llmjepa_kernels``, for other processes too. A candidate
    that fails is not chosen, unless all do; a cache that cannot be read or written is done without.

    Args:
        kind: All that the speed depends on, but the device and Triton.
        candidates: What to run, by name.
    """
    import triton

    key = f"{_device_name()} {kind} {triton.__version__}"
    if key not in _chosen:
        name = _stored().get(key, "")
        if name not in candidates:
            times = {name: _time_or_inf(name, run) for name, run in candidates.items()}
            name = min(times, key=times.__getitem__)
            if times[name] < math.inf:
                _store(key, name)
        _chosen[key] = name
    return _chosen[key]


def _stored() -> dict[str, str]:
    try:
        stored = json.loads(_cache_path().read_text())
    except (OSError, ValueError):  # not there yet, or not ours
        return {}
    return stored if isinstance(stored, dict) else {}


def _store(key: str, name: str) -> None:
    """Adds a choice to those of candidates that choose in turn, and of other processes."""
    path = _cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**_stored(), key: name}, file, indent=1)
        os.replace(file.name, path)  # other processes may be reading
    except OSError as error:
        _warn(f"choices of LLMJEPA_AUTOTUNE are not kept for other processes: {error}")


def _time(run: Callable[[], object]) -> float:
    import triton

    return triton.testing.do_bench(run, return_mode="median")


def _time_or_inf(name: str, run: Callable[[], object]) -> float:
    try:
        return _time(run)
    except Exception as error:  # whatever a compiler, a driver or a library raises
        _warn(f"LLMJEPA_AUTOTUNE passes over {name}, which failed: {error!r:.300}")
        return math.inf


@cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _cache_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "llmjepa_kernels" / "autotune.json"


@cache
def _device_name() -> str:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None, "only work of a GPU is timed"
    return getattr(torch, accelerator.type).get_device_name()
