"""Triton's real binder, compiler and launcher over a CUDA driver that runs nothing.

What is launched gets as far as `cuLaunchKernelEx`, with tensors of the CPU; the driver of
cuda_stub.c checks tensor maps and launches, and here the parameters that arrived there are compared
with what the kernel's PTX declares and with what Python passed. A process that has met the stub
cannot go back: run this in one of its own.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("cuda_stub.c")
# Bytes of shared memory a block may have.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def cuda_include() -> Path | None:
    """The folder of a cuda.h: the one that Triton's wheel ships, or an installed toolkit's."""
    import triton

    folders = [Path(triton.__file__).parent / "backends/nvidia/include"]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(Path(home) / "include")
    folders += sorted(Path("/usr/local").glob("cuda*/include"))
    return next((folder for folder in folders if (folder / "cuda.h").exists()), None)


def build(folder: Path) -> Path:
    """Compiles the stub as `folder`/libcuda.so.1 and returns the folder."""
    compiler = os.environ.get("CC") or str(sysconfig.get_config_var("CC")).split()[0]
    library = folder / "libcuda.so.1"
    flags = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{cuda_include()}"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    (folder / "libcuda.so").symlink_to(library)
    return folder


def activate(folder: Path, arch: int) -> Any:
    """Makes Triton launch on a stub of `arch` (90 is sm_90); returns the stub.

    Args:
        folder: What `build` returned.
    """
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ.pop("TRITON_INTERPRET", None)
    # Before anything else can load a real one: Triton's launcher finds it by its name.
    stub = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    stub.stub_launches.restype = stub.stub_maps.restype = ctypes.c_long
    stub.stub_parameters.restype = ctypes.c_void_p
    stub.stub_expect.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    stub.stub_expect.restype = None
    stub.stub_set_device(arch // 10, arch % 10, SHARED_BYTES[arch])

    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    active = CudaDriver()
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device=None: 0
    active.get_device_capability = lambda device=None: divmod(arch, 10)
    driver.set_active(active)
    return stub


def compare_parameters(stub: Any, launched: Callable[[str], None]) -> None:
    """From now on, what every launch hands over must be what Python passed and PTX declares.

    Args:
        launched: Is given the name of each kernel that was launched.
    """
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    load, run = CompiledKernel._init_handles, JITFunction.run

    def declare(self: Any) -> None:
        fresh = self.module is None
        load(self)
        if fresh:
            sizes = [size for size, _ in _declared(self.asm["ptx"])]
            stub.stub_expect(self.function, len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def check(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        before = stub.stub_launches()
        kernel = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        name = self.fn.__name__
        assert stub.stub_launches() == before + 1, f"{name} was not launched"
        own = {key: value for key, value in kwargs.items() if key in self.signature.parameters}
        arguments = self.signature.bind(*args, **own).arguments
        expected = [
            value
            for key, kind in kernel.src.signature.items()
            for value in _leaves(kind, arguments.get(key))
        ]
        declared = _declared(kernel.asm["ptx"])
        memory = ctypes.string_at(stub.stub_parameters(), sum(size for size, _ in declared))
        # Two more, the scratch memory that Triton adds
        assert len(declared) == len(expected) + 2, (name, declared, expected)
        offset = 0
        for (size, _), value in zip(declared, expected, strict=False):
            got = memory[offset : offset + size]
            assert got[: len(value)] == value, (name, offset, got, value)
            assert size in (len(value), 128), (name, offset, size, value)
            offset += size
        launched(name)
        return kernel

    CompiledKernel._init_handles = declare
    JITFunction.run = check


def _declared(ptx: str) -> list[tuple[int, str]]:
    """(bytes, type) of each parameter of the kernel."""
    head = ptx[ptx.index(".entry") :]
    found = re.findall(r"\.param\s+(.*?)\s*\w+_param_\d+(?:\[(\d+)\])?", head[: head.index("{")])
    declared = []
    for kind, length in found:
        bits = re.search(r"\.[bsuf](8|16|32|64)\b", kind)
        assert bits is not None, kind
        declared.append((int(bits[1]) // 8 * int(length or 1), kind))
    return declared


def _leaves(kind: Any, value: Any) -> Iterator[bytes]:
    """The bytes of each parameter that an argument of this type becomes."""
    if isinstance(kind, tuple):
        for inner, item in zip(kind, value, strict=True):
            yield from _leaves(inner, item)
    elif kind.startswith("tensordesc"):
        yield struct.pack("P", value.base.data_ptr())  # as the stub encodes it, first
        yield from (struct.pack("i", size) for size in value.shape)
        yield from (struct.pack("q", stride) for stride in value.strides)
    elif kind != "constexpr":
        form = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u64": "Q", "fp32": "f"}
        if kind.startswith("*"):
            yield struct.pack("P", value.data_ptr())
        else:
            yield struct.pack(form[kind], value)
