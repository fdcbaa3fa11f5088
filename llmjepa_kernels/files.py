"""Files: of checkpoints, never half written, never written by two, and told apart by content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that is either the old or the new one at any time, even on a full disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def file_of_checkpoint(checkpoint: str | os.PathLike[str], name: str) -> Path | None:
    """A file beside a checkpoint's weights; None without it, or offline.

    Args:
        checkpoint: A directory, or a model of the Hugging Face hub.
        name: Of the file.
    """
    local = Path(checkpoint)
    if local.exists():
        return local / name if (local / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(str(checkpoint), name))
    except EntryNotFoundError:
        return None


def share_as_umask_says(directory: Path) -> None:
    """Lets others read weights, which safetensors writes for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in directory.glob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def file_digest(path: Path) -> str:
    """Tells whether a file has the same bytes as another."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def only_process(place: Path) -> Iterator[None]:
    """Inside, no other process is in here for the same place; the system ends it with the process.

    Args:
        place: A directory, in which ``.lock`` is locked, or a file, which need not exist and beside
            which ``.NAME.lock`` is.

    Raises:
        BlockingIOError: Another one is.
    """
    from filelock import FileLock, Timeout

    place = place.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / ".lock" if place.is_dir() else place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(f"another process is writing to {place}") from None
    try:
        yield
    finally:
        lock.release()
