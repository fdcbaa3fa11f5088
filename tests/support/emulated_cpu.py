"""Stands in for the CPU library with one that was cross-compiled and runs in an emulator."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

from llmjepa_kernels.ops import cpu
from tests.support.build_cpu import build_library

ITEM_SIZES = (4, 8, 2, 2)  # of LkDtype


class EmulatedLibrary:
    """The functions of csrc/api.h, each call of which runs in QEMU.

    Args:
        machine: As ``uname -m`` calls it.
        build: An empty directory.
    """

    def __init__(self, machine: str, build: Path):
        compiler = f"{machine}-linux-gnu-g++"
        environment = {
            "LLMJEPA_CPU_MACHINE": machine,
            "CC": f"{machine}-linux-gnu-gcc",
            "CXX": compiler,
            "LDSHARED": f"{compiler} -shared",
            "LDCXXSHARED": f"{compiler} -shared",
        }
        library = build_library(build, **environment)
        driver = build / "driver"
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run([compiler, "-std=c++17", "-O1", source, "-ldl", "-o", driver], check=True)
        self.directory = build
        self.command = [f"qemu-{machine}", "-L", f"/usr/{machine}-linux-gnu", driver]
        self.command.append(library)
        self.isas = subprocess.check_output(self.command, text=True).split()

    @staticmethod
    def is_available(machine: str) -> bool:
        tools = [f"{machine}-linux-gnu-gcc", f"{machine}-linux-gnu-g++", f"qemu-{machine}"]
        return all(shutil.which(tool) for tool in tools)

    def lk_isa_name(self, index: int) -> bytes | None:
        return self.isas[index].encode() if index < len(self.isas) else None

    def __getattr__(self, function: str):
        kinds = {"attention": attention_sizes, "tubes": tubes_sizes}
        sizes = kinds.get(function.split("_")[1], pairs_sizes)
        return lambda reference: self.call(function, reference._obj, sizes)

    def call(self, function: str, arguments: ctypes.Structure, sizes) -> int:
        buffers = []  # (offset of the pointer, address, size)
        for name, size in sizes(arguments).items():
            field = getattr(arguments, name)
            address = field.data if isinstance(field, ctypes.Structure) else field
            if address:
                buffers.append((getattr(type(arguments), name).offset, address, size))
        call, result = self.directory / "call", self.directory / "result"
        with call.open("wb") as file:
            file.write(struct.pack("q", ctypes.sizeof(arguments)) + bytes(arguments))
            file.write(struct.pack("q", len(buffers)))
            for offset, address, size in buffers:
                file.write(struct.pack("qq", offset, size) + ctypes.string_at(address, size))
        subprocess.run([*self.command, function, call, result], check=True)
        with result.open("rb") as file:
            (status,) = struct.unpack("q", file.read(8))
            for _, address, size in buffers:
                ctypes.memmove(address, file.read(size), size)
        return status


def attention_sizes(a: ctypes.Structure) -> dict[str, int]:
    """Bytes behind each pointer of LkAttention."""
    item, stat = ITEM_SIZES[a.dtype], 8 if a.dtype == 1 else 4
    blocks = -(-a.seq // a.block_m)

    def tensor(name: str, heads: int) -> int:
        x = getattr(a, name)
        last = (a.batch - 1) * x.batch_stride + (heads - 1) * x.head_stride
        return (last + (a.seq - 1) * x.seq_stride + a.dim) * item

    return {
        "visible_until": 4 * a.batch * a.seq,
        "positions": 4 * a.batch * a.seq,
        "kv_offsets": 4 * a.batch * (blocks + 1),
        "kv_full_start": 4 * a.batch * (blocks + 1),
        "kv_indices": 4 * a.batch * a.kv_indices_stride,
        "sinks": stat * a.heads,
        "dsinks": stat * a.heads,
        "lse": stat * a.batch * a.heads * a.seq,
        "delta": stat * a.batch * a.heads * a.seq,
        **{name: tensor(name, a.heads) for name in ("q", "out", "dout", "dq")},
        **{name: tensor(name, a.kv_heads) for name in ("k", "v", "dk", "dv")},
    }


def pairs_sizes(a: ctypes.Structure) -> dict[str, int]:
    """Bytes behind each pointer of LkPairs."""
    item, stat = ITEM_SIZES[a.dtype], 8 if a.dtype == 1 else 4
    count = a.batch * a.num_pairs
    last = (a.batch - 1) * a.hidden_batch_stride + (a.seq - 1) * a.hidden_seq_stride
    return {
        "hidden": item * (last + a.dim),
        "dhidden": item * a.batch * a.seq * a.dim,
        "pairs": 16 * count,
        "ddistance": stat * count,
        "stats": 3 * stat * count,
        "loss": stat * (count if a.reduction == cpu.REDUCTIONS["none"] else 1),
        "views": 2 * stat * count * a.dim,
        "dviews": 2 * stat * count * a.dim,
        "squares": 2 * stat * count,
        "dots": 2 * stat * count,
    }


def tubes_sizes(a: ctypes.Structure) -> dict[str, int]:
    """Bytes behind each pointer of LkTubes."""
    item, vector = ITEM_SIZES[a.dtype], (8 if a.dtype == 1 else 4) * a.dim
    last = (a.batch - 1) * a.hidden_batch_stride + (a.seq - 1) * a.hidden_seq_stride
    return {
        "hidden": item * (last + a.dim),
        "dhidden": item * a.batch * a.seq * a.dim,
        "tubes": 48 * a.batch * a.num_vectors,
        "vectors": vector * a.batch * a.num_vectors,
        "dvectors": vector * a.batch * a.num_vectors,
    }
