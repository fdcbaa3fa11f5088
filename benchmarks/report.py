"""Tables on the terminal, and beside them JSON with the machine, the versions and the commit."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "flash-attn-3", "numpy")


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a number was measured on, and with."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    device = torch.device(device)
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "matmul": _matmul_library(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: installed(name) for name in PACKAGES},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


@cache
def _matmul_library() -> str:
    """What ran a matrix product on the CPU: oneDNN if it says so, else the BLAS of torch."""
    a = torch.ones(64, 64)
    with tempfile.TemporaryFile() as file:
        stdout = os.dup(1)
        os.dup2(file.fileno(), 1)  # oneDNN writes past Python
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                a @ a
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(stdout, 1)
            os.close(stdout)
        file.seek(0)
        if b"exec,cpu" in file.read():
            return "oneDNN"
    built = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return {"mkl": "MKL", "open": "OpenBLAS"}.get(built[1], built[1]) if built else "unknown"


@dataclass
class Table:
    """The answer to one question.

    Attributes:
        columns: (key, header, format string) of each column; a row without the key shows a dash.
        rows: One mapping per line, with what the JSON should hold besides.
        notes: Lines below the table.
        refused: What was not printed because its result is wrong.
    """

    title: str
    columns: Sequence[tuple[str, str, str]]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def progress(line: str) -> None:
    """Tells whoever waits what has been done."""
    print(line, file=sys.stderr, flush=True)


def show(
    tables: Sequence[Table], path: Path | None, device: torch.device | str, command: dict[str, Any]
) -> None:
    """Prints the tables, and writes them as JSON with the machine and the command's options."""
    for table in tables:
        print(draw(table))
    about = machine(device)
    print(summary(about))
    if path is not None:
        write(path, tables, about, command)
        print(path)


def free_name(path: Path) -> Path:
    """The path, with a number where a file of that name is there already."""
    numbered = (path.with_stem(f"{path.stem}.{number}") for number in itertools.count(1))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())


def summary(about: dict[str, Any]) -> str:
    """One line of what `machine` says."""
    commit = (about["commit"] or "unknown")[:10] + " with changes" * about["uncommitted_changes"]
    return (
        f"{about['processor']}, {about['threads']} threads, matrix products by {about['matmul']}, "
        f"device {about['device']}, torch {about['versions']['torch']}, commit {commit}"
    )


def write(
    path: Path, tables: Sequence[Table], about: dict[str, Any], command: dict[str, Any]
) -> None:
    """The tables as JSON, with the machine and the command's options."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tables_as_dicts = [vars(table) for table in tables]
    content = {"machine": about, "command": command, "tables": tables_as_dicts}
    path.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")


def draw(table: Table) -> str:
    """A table as text: words to the left, numbers to the right."""
    head = [header.split("\n") for _, header, _ in table.columns]
    height = max(map(len, head))
    lines = [[column[i] if i < len(column) else "" for column in head] for i in range(height)]
    for row in table.rows:
        lines.append([_cell(row.get(key), template) for key, _, template in table.columns])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [template == "{}" for *_, template in table.columns]
    texts = []
    for line in lines:
        cells = zip(line, widths, left, strict=True)
        texts.append("  ".join(x.ljust(w) if is_text else x.rjust(w) for x, w, is_text in cells))
    texts.insert(height, "-" * max(map(len, texts)))
    wrong = [f"WRONG, refused: {name}" for name in table.refused]
    return "\n".join([table.title, *map(str.rstrip, texts), *table.notes, *wrong, ""])


def _cell(value: Any, template: str) -> str:
    return "-" if value is None else template.format(value)
