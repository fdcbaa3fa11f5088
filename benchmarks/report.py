"""Tables on the terminal, and beside them JSON with the machine, the versions and the commit."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
WIDTH = 120  # of tables that go into a file
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "numpy")


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
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    for table in tables:
        drawn = RichTable(box=box.SIMPLE_HEAD, title=table.title, title_justify="left", padding=0)
        for index, (_, header, _) in enumerate(table.columns):
            drawn.add_column(header, justify="right" if index else "left", no_wrap=True)
        for row in table.rows:
            cells = (_cell(row.get(key), template) for key, _, template in table.columns)
            drawn.add_row(*cells)
        console.print(drawn)
        for line in (*table.notes, *(f"WRONG, refused: {name}" for name in table.refused)):
            console.print(line, markup=False)
        console.print()
    about = machine(device)
    commit = (about["commit"] or "unknown")[:10] + " with changes" * about["uncommitted_changes"]
    console.print(
        f"{about['processor']}, {about['threads']} threads, device {about['device']}, "
        f"torch {about['versions']['torch']}, commit {commit}",
        markup=False,
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tables_as_dicts = [vars(table) for table in tables]
        content = {"machine": about, "command": command, "tables": tables_as_dicts}
        path.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
        console.print(str(path), markup=False)


def _cell(value: Any, template: str) -> str:
    return "-" if value is None else template.format(value)
