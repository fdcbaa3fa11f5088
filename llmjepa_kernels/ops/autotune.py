"""LLMJEPA_AUTOTUNE=1: what could run is timed where it is first met, and the fastest remembered."""

from __future__ import annotations

import json
import os
import tempfile
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

    The choice is kept in ``$XDG_CACHE_HOME/llmjepa_kernels``, for other processes too.

    Args:
        kind: All that the speed depends on, but the device and Triton.
        candidates: What to run, by name.
    """
    import triton

    key = f"{_device_name()} {kind} {triton.__version__}"
    if key not in _chosen:
        name = _stored().get(key)
        if name not in candidates:
            name = min(candidates, key=lambda name: _time(candidates[name]))
            _store(key, name)
        _chosen[key] = name
    return _chosen[key]


def _stored() -> dict[str, str]:
    path = _cache_path()
    return json.loads(path.read_text()) if path.exists() else {}


def _store(key: str, name: str) -> None:
    """Adds a choice to those of candidates that choose in turn, and of other processes."""
    path = _cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump({**_stored(), key: name}, file, indent=1)
    os.replace(file.name, path)  # other processes may be reading


def _time(run: Callable[[], object]) -> float:
    import triton

    return triton.testing.do_bench(run, return_mode="median")


def _cache_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "llmjepa_kernels" / "autotune.json"


@cache
def _device_name() -> str:
    return getattr(torch, torch.accelerator.current_accelerator().type).get_device_name()
