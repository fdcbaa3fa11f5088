"""Which checkpoints of a run are complete, so that training resumes from none that was cut off."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from llmjepa_kernels.files import file_digest, write_whole

MANIFEST = "complete.json"
UNFINISHED = "checkpoint-is-incomplete.txt"  # beside what Trainer's enable_jit_checkpoint writes


@contextmanager
def saving(what: str | PathLike[str]) -> Iterator[None]:
    """Names what could not be saved, as an OSError; libraries raise what they like on full disks.

    Weights that are not finite are no such fault.
    """
    try:
        yield
    except FloatingPointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{what} could not be saved: {reason}") from error


def mark_complete(checkpoint: str | PathLike[str]) -> None:
    """Writes down the sizes and digests of a checkpoint's files, once all of them are there."""
    files = {
        name: {"bytes": path.stat().st_size, "blake2b": file_digest(path)}
        for name, path in _files(Path(checkpoint)).items()
    }
    write_whole(Path(checkpoint) / MANIFEST, json.dumps(files, indent=1))


def why_incomplete(checkpoint: str | PathLike[str]) -> str | None:
    """What is missing of a checkpoint, or other than it was saved; None if nothing is."""
    path = Path(checkpoint) / MANIFEST
    if not path.is_file():
        return f"it has no {MANIFEST}: saving it was interrupted"
    try:
        expected = json.loads(path.read_bytes())
        found = _files(Path(checkpoint))
        for name, saved in expected.items():
            if name not in found:
                return f"{name} is missing"
            size = found[name].stat().st_size
            if size != saved["bytes"]:
                return f"{name} has {size} bytes instead of {saved['bytes']}"
            if file_digest(found[name]) != saved["blake2b"]:
                return f"{name} has other content than was saved"
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        return f"{MANIFEST} is corrupt: {error}"
    return None


def has_training_state(checkpoint: Path) -> bool:
    """Whether Trainer has saved more of it than weights, which ``save_only_model`` leaves it at."""
    return any(checkpoint.glob("rng_state*"))


def checkpoints(directory: str | PathLike[str]) -> list[Path]:
    """The checkpoints of a run, complete or not, the latest first."""
    found = [
        path
        for path in Path(directory).glob("checkpoint-*")
        if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _files(checkpoint: Path) -> dict[str, Path]:
    return {
        str(path.relative_to(checkpoint)): path
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, UNFINISHED)
    }
