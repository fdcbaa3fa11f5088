"""Writes the operations as a kernel repository of the Hugging Face hub.

    python .ci/kernel_repository.py DIR

DIR gets what `kernels.get_kernel` loads (``build/torch-BACKEND``) and what kernel-builder would
make it of (``build.toml``, ``torch-ext``). A kernel may be loaded under any name and beside other
versions of itself, so its modules import each other relatively, find back ends by their own
package, and register operations under a name of their own. The C++ kernels stay with the package:
on the CPU such a kernel is plain PyTorch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAME, PACKAGE = "llmjepa-attention", "llmjepa_attention"
VERSION = 1
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
SOURCES = ("checks.py", "ops/**/*.py")
INIT = '''"""Block-sparse attention for trees of segments, and losses of single tokens."""

from .ops.attention import view_attention
from .ops.block_mask import BlockMask
from .ops.loss import last_token_loss
from .ops.tubes import semantic_tube_loss

__all__ = ["BlockMask", "last_token_loss", "semantic_tube_loss", "view_attention"]
'''
OPS = """import torch

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
"""
BUILD = f"""[general]
edition = 5
name = "{NAME}"
version = {VERSION}
license = "Apache-2.0"
backends = [{", ".join(f'"{backend}"' for backend in BACKENDS)}]

[torch-noarch]
"""


def relocated(source: str, depth: int) -> str:
    """A module of the package for any other name.

    Args:
        source: Its text.
        depth: Of packages above it, within the package.
    """
    up = "." * (depth + 1)
    found = re.sub(r"^(\s*from) llmjepa_kernels\.", rf"\1 {up}", source, flags=re.MULTILINE)
    own = f'".".join(__package__.split(".")[:{-depth or None}])'
    found = re.sub(r'"llmjepa_kernels(\.ops\.[\w.]+)"', rf'{own} + "\1"', found)
    found, names = re.subn(
        r'"llmjepa_kernels::(\w+)"', r'_ops.add_op_namespace_prefix("\1")', found
    )
    found, calls = re.subn(r"\btorch\.ops\.llmjepa_kernels\b", "_ops.ops", found)
    if names or calls:
        found = re.sub(
            r"^(from __future__ import annotations\n)",
            rf"\1\nfrom {up} import _ops\n",
            found,
            count=1,
            flags=re.MULTILINE,
        )
    return found


def modules() -> dict[str, str]:
    """The files of the kernel, without the name that its operations are registered by."""
    package = ROOT / "llmjepa_kernels"
    found = {"__init__.py": INIT}
    for pattern in SOURCES:
        for path in sorted(package.glob(pattern)):
            name = path.relative_to(package)
            found[str(name)] = relocated(path.read_text(), len(name.parts) - 1)
    return found


def write_repository(directory: Path) -> None:
    files = modules()
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:7]
    targets = {directory / "torch-ext" / PACKAGE: None}
    for backend in BACKENDS:
        targets[directory / "build" / f"torch-{backend}"] = backend
    for target, backend in targets.items():
        for name, text in files.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if backend is None:  # kernel-builder writes _ops.py
            continue
        own = f"_{PACKAGE}_{backend}_{digest}"
        (target / "_ops.py").write_text(OPS.format(name=own))
        metadata = {
            "id": own,
            "name": NAME,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (directory / "build.toml").write_text(BUILD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="must not be there yet")
    directory = parser.parse_args().directory
    directory.mkdir(parents=True)
    write_repository(directory)
    print(f"{NAME} {VERSION}, for {', '.join(BACKENDS)}: {directory}")


if __name__ == "__main__":
    main()
