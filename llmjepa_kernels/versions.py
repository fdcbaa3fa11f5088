"""The oldest versions that this package runs on; older ones are refused by name at import."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

OLDEST = {"torch": "2.10", "triton": "3.6", "transformers": "5.5"}


def check_versions() -> None:
    """Reads what is installed without importing it; what is not there is not needed yet.

    Raises:
        ImportError: A package is older than ``OLDEST`` says; names both versions.
    """
    for name, oldest in OLDEST.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if _release(found) < _release(oldest):
            raise ImportError(
                f"llmjepa_kernels needs {name} {oldest} or newer, found {found}: "
                f"pip install -U '{name}>={oldest}'"
            )


def _release(number: str) -> tuple[int, ...]:
    """(2, 10) of 2.10.0a0+git."""
    return tuple(map(int, re.findall(r"\d+", number)[:2]))


check_versions()
