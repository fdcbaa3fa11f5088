"""Which checkpoints of a run are complete, so that training resumes from none that was cut off."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError

from llmjepa_kernels.files import write_whole

MANIFEST = "complete.json"


@contextmanager
def saving(what: str | PathLike[str]) -> Iterator[None]:
    """Names what could not be saved, as an OSError whatever the library raised, on a full disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{what} could not be saved: {error}") from error


def mark_complete(checkpoint: str | PathLike[str]) -> None:
    """Writes down the sizes of a checkpoint's files, once all of them are there."""
    checkpoint = Path(checkpoint)
    write_whole(checkpoint / MANIFEST, json.dumps(_sizes(checkpoint), indent=1))


def why_incomplete(checkpoint: str | PathLike[str]) -> str | None:
    """What is missing of a checkpoint; None if nothing is."""
    path = Path(checkpoint) / MANIFEST
    if not path.is_file():
        return f"it has no {MANIFEST}: saving it was interrupted"
    try:
        expected = json.loads(path.read_bytes())
        found = _sizes(Path(checkpoint))
        for name, size in expected.items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != size:
                return f"{name} has {found[name]} bytes instead of {size}"
    except (ValueError, AttributeError) as error:
        return f"{MANIFEST} is corrupt: {error}"
    return None


def checkpoints(directory: str | PathLike[str]) -> list[Path]:
    """The checkpoints of a run, complete or not, the latest first."""
    found = [
        path
        for path in Path(directory).glob("checkpoint-*")
        if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _sizes(checkpoint: Path) -> dict[str, int]:
    return {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
