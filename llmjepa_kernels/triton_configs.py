"""Tile configurations of the Triton kernels: a table, and a timer that chooses from it."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel for a class of inputs.

    Attributes:
        block_m, block_n: Queries and keys of a compute tile; they divide the mask's block.
        tma: Read tiles through tensor descriptors instead of pointers.
        halves: Hold the head dim as two halves, for shorter-lived registers.
        maxnreg: Upper bound on the registers of a thread.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = False
    halves: bool = False
    maxnreg: int | None = None


def current_arch() -> str:
    """`sm_90`, `gfx942`, … of the current device; `interpreter` where Triton interprets."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def head_dim_pieces(head_dim: int, halves: bool = False) -> tuple[int, int]:
    """Powers of two that cover the head dim with the least padding: 80 = 64 + 16."""
    whole = max(16, triton.next_power_of_2(head_dim))
    first = whole // 2
    if halves and whole == head_dim and first >= 16:
        return first, first
    rest = max(16, triton.next_power_of_2(head_dim - first))
    return (first, rest) if first >= 16 and first + rest < whole else (whole, 0)


def choose(direction, arch, head_dim, dtype, mask_block, allow_tma):
    m, n = mask_block
    return Config(min(m, 64), min(n, 64), tma=False)
