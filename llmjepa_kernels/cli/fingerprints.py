"""Short digests that tell whether a command goes on with the same data and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from llmjepa_kernels.files import file_digest

DIGEST_SIZE = 16


def data_fingerprint(*parts: Iterable[Mapping[str, Any]]) -> str:
    """Tells samples apart, and how they are divided into parts."""
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for part in parts:
        for sample in part:
            digest.update(json.dumps(sample, sort_keys=True, default=str).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def source_fingerprint(source: str) -> str | None:
    """Tells whether the files of a source of data have changed; None if they are elsewhere."""
    path = Path(source)
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for each in sorted(files):
        digest.update(f"{each.relative_to(path)} {file_digest(each)}\n".encode())
    return digest.hexdigest() if files else None


@torch.no_grad()
def weights_fingerprint(model: torch.nn.Module, *, values: int = 64) -> str:
    """Tells models apart by the shape and some values of every parameter.

    Training changes nearly all values, so a few of each tell, at no cost for large models.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // values)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()
