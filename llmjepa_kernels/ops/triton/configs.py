"""Tile configurations of the Triton attention kernels: a table, and the choice from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from llmjepa_kernels.ops import autotune

MIN_TILE = 16  # the smallest side of a matrix product


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel.

    Attributes:
        block_m, block_n: Queries and keys of a compute tile; they divide the mask's block.
        tma: Read tiles through tensor descriptors instead of pointers.
        pieces: Hold the head dim as so many pieces, which shortens the life of registers.
        eager_dp: In the backward, start dP before the softmax that it does not depend on:
            asynchronous matrix units then overlap the two, for more live registers.
        maxnreg: Upper bound on the registers of a thread.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = False
    pieces: int = 1
    eager_dp: bool = False
    maxnreg: int | None = None


# {(architecture, head dim): {direction: candidates}}, the best first: by the static model of
# benchmarks/gpu_static.py, and for sm_90 by benchmarks/gpu_configs.py on an H100. The last of each
# direction reads through pointers and divides 64 x 64 masks. A head dim without an entry uses that
# of 64, 128 or 256. Where registers cannot hold both of dK and dV, they are computed apart, at the
# price of one more product.
TABLE: dict[tuple[str, int], dict[str, list[Config]]] = {
    ("sm_80", 64): {
        "forward": [Config(128, 64, 4, 3), Config(64, 64, 2, 2), Config(64, 64, 4, 3)],
        "dkdv": [Config(32, 128, 4, 3), Config(32, 64, 2, 3), Config(64, 64, 4, 2)],
        "dq": [Config(128, 32, 4, 3), Config(64, 32, 2, 3), Config(64, 64, 4, 3)],
    },
    ("sm_80", 128): {
        "forward": [
            Config(128, 32, 4, 3, pieces=2),
            Config(64, 32, 2, 2, pieces=2),
            Config(64, 64, 4, 2, pieces=2),
        ],
        "dkdv": [Config(64, 64, 4, 2)],
        "dq": [Config(128, 32, 4, 2), Config(64, 64, 4, 2)],
    },
    ("sm_80", 160): {
        "forward": [Config(128, 32, 8, 2, pieces=8), Config(64, 32, 4, 1, pieces=8)],
        "dk": [Config(64, 64, 4, 2, pieces=8)],
        "dv": [Config(64, 64, 4, 2, pieces=8)],
        "dq": [Config(64, 64, 4, 2, pieces=8)],
    },
    ("sm_80", 192): {
        "forward": [Config(128, 64, 8, 2, pieces=8), Config(64, 64, 4, 2, pieces=8)],
        "dkdv": [Config(64, 32, 4, 2, pieces=4)],
        "dq": [Config(64, 32, 4, 2, pieces=8)],
    },
    ("sm_80", 256): {
        "forward": [Config(128, 64, 8, 2, pieces=4), Config(64, 32, 4, 2, pieces=4)],
        "dkdv": [Config(64, 64, 8, 2, pieces=2)],
        "dq": [Config(64, 64, 8, 2, pieces=2)],
    },
    ("sm_86", 64): {
        "forward": [Config(128, 64, 4, 3), Config(64, 64, 2, 2), Config(64, 64, 4, 3)],
        "dkdv": [Config(32, 128, 4, 3), Config(32, 64, 2, 3), Config(64, 64, 4, 2)],
        "dq": [Config(128, 32, 4, 3), Config(64, 32, 2, 3), Config(64, 64, 4, 3)],
    },
    ("sm_86", 128): {
        "forward": [
            Config(128, 64, 8, 2, pieces=2),
            Config(64, 32, 2, 2, pieces=2),
            Config(64, 64, 4, 2, pieces=2),
        ],
        "dkdv": [Config(64, 64, 4, 2)],
        "dq": [Config(128, 32, 4, 2), Config(64, 64, 4, 2)],
    },
    ("sm_86", 160): {
        "forward": [Config(128, 64, 8, 2, pieces=8), Config(64, 64, 4, 2, pieces=8)],
        "dk": [Config(64, 64, 4, 2, pieces=8)],
        "dv": [Config(64, 64, 4, 2, pieces=8)],
        "dq": [Config(64, 64, 4, 2, pieces=8)],
    },
    ("sm_86", 192): {
        "forward": [Config(128, 64, 8, 2, pieces=8), Config(64, 64, 4, 2, pieces=8)],
        "dkdv": [Config(64, 32, 4, 2, pieces=4)],
        "dq": [Config(64, 32, 4, 2, pieces=8)],
    },
    ("sm_86", 256): {
        "forward": [Config(64, 32, 4, 2, pieces=4)],
        "dkdv": [Config(32, 32, 4, 2, pieces=2)],
        "dq": [Config(32, 32, 4, 2, pieces=2)],
    },
    ("sm_90", 64): {
        "forward": [
            Config(64, 128, 4, 2, tma=True, maxnreg=168),
            Config(64, 64, 4, 2, tma=True, maxnreg=96),
            Config(64, 64, 4, 2),
        ],
        "dkdv": [Config(64, 64, 4, 2, tma=True, eager_dp=True), Config(64, 64, 4, 2)],
        "dq": [Config(64, 64, 4, 2, tma=True, eager_dp=True), Config(64, 64, 4, 2)],
    },
    ("sm_90", 128): {
        "forward": [
            Config(64, 128, 4, 1, tma=True),
            Config(128, 128, 8, 2, tma=True),
            Config(64, 64, 4, 2, tma=True),
            Config(64, 64, 4, 2),
        ],
        "dkdv": [Config(64, 64, 4, 2, tma=True, eager_dp=True), Config(32, 64, 4, 2)],
        "dq": [Config(64, 64, 4, 2, tma=True, eager_dp=True), Config(64, 64, 4, 2)],
    },
    ("sm_90", 256): {
        "forward": [
            Config(128, 64, 8, 2, tma=True),
            Config(64, 64, 4, 1, tma=True),
            Config(64, 32, 4, 2),
        ],
        "dk": [Config(64, 64, 4, 2, tma=True, eager_dp=True), Config(16, 64, 4, 1)],
        "dv": [Config(64, 64, 4, 1, tma=True), Config(32, 64, 4, 1)],
        "dq": [Config(64, 64, 4, 2, tma=True, eager_dp=True), Config(64, 32, 4, 2)],
    },
    ("sm_100", 64): {
        "forward": [
            Config(128, 64, 4, 2, tma=True),
            Config(64, 64, 4, 2, tma=True),
            Config(64, 64, 4, 2),
        ],
        "dkdv": [
            Config(128, 128, 8, 1, tma=True, eager_dp=True),
            Config(64, 64, 4, 2, tma=True, eager_dp=True),
            Config(64, 64, 4, 2),
        ],
        "dq": [
            Config(128, 64, 4, 1, tma=True, eager_dp=True),
            Config(64, 64, 4, 2, tma=True, eager_dp=True),
            Config(64, 64, 4, 2),
        ],
    },
    ("sm_100", 128): {
        "forward": [
            Config(128, 128, 8, 2, tma=True),
            Config(64, 64, 4, 2, tma=True),
            Config(64, 64, 4, 2),
        ],
        "dkdv": [
            Config(128, 128, 8, 1, tma=True, eager_dp=True),
            Config(64, 64, 4, 2, tma=True, eager_dp=True),
            Config(64, 64, 4, 2),
        ],
        "dq": [
            Config(128, 64, 4, 1, tma=True, eager_dp=True),
            Config(64, 64, 4, 2, tma=True, eager_dp=True),
            Config(64, 64, 4, 2),
        ],
    },
    ("sm_100", 256): {
        "forward": [
            Config(128, 64, 8, 2, tma=True),
            Config(64, 64, 4, 2, tma=True),
            Config(64, 32, 4, 1),
        ],
        "dk": [Config(64, 64, 4, 1, tma=True), Config(32, 64, 4, 1)],
        "dv": [Config(64, 64, 4, 1, tma=True), Config(32, 64, 4, 1)],
        "dq": [Config(64, 64, 4, 2, tma=True, eager_dp=True), Config(64, 32, 4, 1)],
    },
    ("gfx942", 64): {
        "forward": [Config(128, 64, 4, 1), Config(64, 64, 4, 1)],
        "dkdv": [Config(64, 64, 4, 1)],
        "dq": [Config(64, 64, 4, 1)],
    },
    ("gfx942", 128): {
        "forward": [Config(128, 64, 4, 1), Config(64, 64, 4, 1)],
        "dkdv": [Config(32, 64, 4, 1)],
        "dq": [Config(64, 64, 4, 1)],
    },
    ("gfx942", 256): {
        "forward": [Config(64, 64, 4, 1), Config(64, 32, 4, 1)],
        "dkdv": [Config(32, 32, 4, 1)],
        "dq": [Config(64, 32, 4, 1)],
    },
}


@cache
def candidates(
    direction: str,
    *,
    arch: str,
    head_dim: int,
    dtype: torch.dtype,
    block_size: tuple[int, int],
    allow_tma: bool = True,
) -> tuple[Config, ...]:
    """The configurations worth trying, the best first.

    Args:
        direction: "forward", "dq", and "dkdv" or "dk" and "dv".
        block_size: Of the mask; a configuration's tile must divide it.
        allow_tma: Whether the tensors are aligned as descriptors require.

    Raises:
        ValueError: `block_size` is no pair of powers of two of at least 16.
    """
    if any(size < MIN_TILE or size & (size - 1) for size in block_size):
        raise ValueError(
            "block_size of the block_mask must be powers of two of at least "
            f"{MIN_TILE} for impl='triton', got {tuple(block_size)}"
        )
    fitting = []
    if dtype != torch.float32:
        fitting = [
            config
            for config in _table_entry(direction, arch, head_dim)
            if block_size[0] % config.block_m == 0
            and block_size[1] % config.block_n == 0
            and (allow_tma or not config.tma)
        ]
    # float32 and unknown architectures may run outside the matrix units, where a large tile is a
    # long program and takes many registers; small masks want small tiles anyway.
    side, num_warps, pieces = (64 if head_dim <= 64 else 32), 4, 1
    if dtype == torch.float32 or not (_family(arch) or arch == "interpreter"):
        side, num_warps = side // 2, 8
    if dtype == torch.float32 and head_dim not in TF32_HEAD_DIMS:
        pieces = max(1, triton.next_power_of_2(head_dim) // MIN_TILE)
    sides = min(block_size[0], side), min(block_size[1], side)
    return tuple(fitting or [Config(*sides, num_warps, num_stages=1, pieces=pieces)])


@cache
def directions(arch: str, head_dim: int, dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels of one forward and backward."""
    tuned = {} if dtype == torch.float32 else TABLE.get(_table_key(arch, head_dim), {})
    return tuple(tuned) or ("forward", "dkdv", "dq")


def launch(
    direction: str,
    run: Callable[[Config], None],
    *,
    head_dim: int,
    dtype: torch.dtype,
    block_size: tuple[int, int],
    allow_tma: bool,
    problem: tuple = (),
) -> None:
    """Runs a kernel in its best configuration that fits the device.

    That is the first candidate or, with ``LLMJEPA_AUTOTUNE=1``, the one that was fastest on this
    device when such work was first met, see `autotune`. Where the device has no room for it, the
    next one is taken, then ever smaller ones; what did not fit is not tried again.

    Args:
        problem: What else the speed depends on.
    """
    arch = current_arch()
    kind = {"head_dim": head_dim, "dtype": dtype, "block_size": block_size, "allow_tma": allow_tma}
    options = candidates(direction, arch=arch, **kind)
    if len(options) > 1 and autotune.is_enabled():
        runs = {str(config): partial(run, config) for config in options}
        name = " ".join(map(str, [direction, *kind.values(), *problem]))
        best = autotune.fastest(name, runs)
        options = tuple(sorted(options, key=lambda config: str(config) != best))
    for config in chain(options, _smaller(options[-1])):
        work = (arch, direction, head_dim, dtype, config)
        if _too_large and work in _too_large:
            continue
        try:
            return run(config)
        except OutOfResources as error:
            # Not the error itself: its traceback holds the tensors of this call.
            _too_large[work] = (error.required, error.limit, error.name)
    raise OutOfResources(*_too_large[work])


_too_large: dict[tuple, tuple] = {}


def _smaller(config: Config) -> Iterator[Config]:
    """Ever smaller configurations, down to the smallest."""
    while config.num_stages > 1 or max(config.block_m, config.block_n) > MIN_TILE:
        if config.num_stages > 1:
            config = replace(config, num_stages=1)
        elif config.block_m >= config.block_n:
            config = replace(config, block_m=config.block_m // 2)
        else:
            config = replace(config, block_n=config.block_n // 2)
        yield config


@cache
def head_dim_pieces(head_dim: int, pieces: int = 1) -> tuple[int, ...]:
    """Powers of two that cover the head dim with the least padding: (64, 16) for 80.

    With `pieces` > 1 they are of one width, so many to the next power of two: (32,) * 5 for 160
    with 8; fewer where that would be too narrow.
    """
    whole = max(MIN_TILE, triton.next_power_of_2(head_dim))
    if pieces > 1:
        width = max(MIN_TILE, whole // pieces)
        return (width,) * triton.cdiv(head_dim, width)
    first = whole // 2
    rest = max(MIN_TILE, triton.next_power_of_2(max(head_dim - first, 1)))
    return (first, rest) if first >= MIN_TILE and first + rest < whole else (whole,)


# Of others, TF32 kernels spill registers, and one stops Triton 3.9 itself.
TF32_HEAD_DIMS = (16, 32, 64, 128)


def dot_precision(dtype: torch.dtype, arch: str, head_dim: int) -> str:
    """How the kernels multiply float32: TF32 where torch allows it to matrix products on GPUs.

    "high" and what the newer ``torch.backends`` calls "tf32", which set the same, take three
    products of TF32, "medium" one.
    """
    match = re.fullmatch(r"sm_(\d+)", arch)
    if dtype != torch.float32 or not match or int(match[1]) < 80:  # no TF32 there
        return "ieee"
    if head_dim not in TF32_HEAD_DIMS:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    try:
        one_product = torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # it refuses to answer where the newer settings were used
        one_product = False
    return "tf32" if one_product else "tf32x3"


INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels were defined


@cache
def can_launch() -> bool:
    """Whether Triton has a device, or interprets."""
    try:
        return INTERPRETED or triton.runtime.driver.active is not None
    except RuntimeError:  # there is no driver
        return False


def current_arch() -> str:
    """`sm_90`, `gfx942`, … of the current device; `interpreter` where Triton interprets."""
    if INTERPRETED:
        return "interpreter"
    driver = triton.runtime.driver.active
    return _arch(driver, driver.get_current_device())


@cache
def _arch(driver: Any, device: object) -> str:
    target = driver.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def _table_entry(direction: str, arch: str, head_dim: int) -> list[Config]:
    key = _table_key(arch, head_dim)
    entry = TABLE.get(key, {}).get(direction, [])
    if head_dim == key[1]:
        return entry
    # In pieces of unequal size, or overhanging the head dim: read through pointers.
    return [replace(config, pieces=1) for config in entry if not config.tma]


def _table_key(arch: str, head_dim: int) -> tuple[str, int]:
    family = _family(arch) or arch
    if (family, head_dim) in TABLE:
        return family, head_dim
    return family, next(width for width in (64, 128, 256) if head_dim <= width)


def _family(arch: str) -> str | None:
    """The architecture whose entries serve `arch`: same instructions, no less shared memory."""
    if match := re.fullmatch(r"sm_(\d+)", arch):
        version = int(match[1])
        if version in (80, 87):
            return "sm_80"
        if version in (86, 89) or version >= 120:
            return "sm_86"
        if version == 90:
            return "sm_90"
        if 100 <= version < 120:
            return "sm_100"
    return "gfx942" if arch in ("gfx90a", "gfx942", "gfx950") else None
