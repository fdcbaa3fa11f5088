"""Everything that only a GPU can show, in one call that ends in one table and one JSON file.

    python -m benchmarks.gpu_day --output DIR

Needs torch, triton, transformers and pytest, no network and no installation. Each part runs in a
process of its own, with its output in DIR, and hands on its rows as it has them: one that fails,
or takes too long, keeps what it found and stops no other.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.report import ROOT, Table, draw, free_name, machine, progress, summary, write

COLUMNS = (
    ("part", "part", "{}"),
    ("work", "work", "{}"),
    ("what", "what", "{}"),
    ("milliseconds", "ms", "{:.3f}"),
    ("speed", "ours is so\nmany times\nas fast", "{:.2f}"),
    ("rate", "TFLOP/s", "{:.1f}"),
    ("note", "note", "{}"),
)

START_UP = 15.0  # seconds: a process has imported everything after some 7 s on the GPU's machine


def run_part(name: str, args: argparse.Namespace) -> None:
    """In a process of its own: writes each row as soon as it is known."""
    from benchmarks.gpu_parts import PARTS, Setting

    setting = Setting(args.device, args.tiny, args.output)
    with (args.output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for row in PARTS[name].rows(setting):
            file.write(json.dumps({"part": name, **row}) + "\n")
            file.flush()
            progress(f"{name}: {row}")


def start_part(name: str, args: argparse.Namespace, seconds: float) -> str:
    """Runs a part in a process of its own; returns how it ended."""
    (args.output / f"{name}.jsonl").unlink(missing_ok=True)  # of an earlier run
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--run", name]
    command += ["--output", str(args.output), "--device", args.device, *["--tiny"] * args.tiny]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with (args.output / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it started ends with it
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"out of time after {seconds:.0f} s"
    return "ok" if code == 0 else f"failed with {code}, see {name}.log"


def rows_of(name: str, output: Path) -> list[dict]:
    """What a part found, whether it ended or not."""
    path = output / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]  # the last may have been cut off


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/gpu_day"))
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these; see --list")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all together (default: 8)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="show that every part starts, on any device"
    )
    parser.add_argument("--run", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.output = args.output.absolute()
    if args.run:
        run_part(args.run, args)
        return 0

    from benchmarks.gpu_parts import PARTS

    if args.list:
        for name, part in PARTS.items():
            print(f"{name:14} {part.minutes:.1f} min  {part.what}")
        return 0
    names = args.parts or list(PARTS)
    if unknown := set(names) - PARTS.keys():
        parser.error(f"--parts must be among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device is cuda, and torch finds no GPU; see --device cpu --tiny")

    args.output.mkdir(parents=True, exist_ok=True)
    results = args.output / "gpu_day.json"
    if results.exists():  # device time is dear
        results.rename(free_name(results))
    end, parts = time.monotonic() + 60 * args.minutes, []
    start_up = min(START_UP, 60 * args.minutes / len(names) / 2)
    table, about = Table("What the GPU showed", COLUMNS), machine(args.device)
    for index, name in enumerate(names):
        # What a part leaves of its share is for those after it.
        later = names[index:]
        share = PARTS[name].minutes / sum(PARTS[one].minutes for one in later)
        start = time.monotonic()
        seconds = start_up + (end - start - start_up * len(later)) * share
        ended = start_part(name, args, max(seconds, 1.0))
        rows = rows_of(name, args.output)
        parts.append({"part": name, "ended": ended, "seconds": time.monotonic() - start})
        table.rows += rows
        table.notes.append(f"{name}: {ended} ({parts[-1]['seconds']:.0f} s, {len(rows)} rows)")
        progress(table.notes[-1])
        # After each, as a part may take the device with it.
        write(results, [table], about, {**vars(args), "ended": parts})
    print(draw(table))
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    print(f"{summary(about)}; {about['system']}; {versions}")
    print(results)
    return int(any(part["ended"] != "ok" for part in parts))


if __name__ == "__main__":
    raise SystemExit(main())
