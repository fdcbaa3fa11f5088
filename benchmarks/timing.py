"""How everything here is timed: interleaved rounds, medians, and the machine's own limits."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    budget: float = float("inf"),
    device: torch.device | str = "cpu",
    setup: Callable[[str], object] = lambda name: None,
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, list[float]]:
    """Seconds of every step in every round.

    Each round runs all steps, every second one in reverse, so that drift of the machine meets all
    alike. A step that has used up `budget` seconds is left out of the rounds that follow.

    Args:
        steps: By name, in order.
        rounds: At least one.
        setup: Called with the name before each run, outside of its time.
        report: Called with a line of progress after each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        for name in list(steps)[:: -1 if index % 2 else 1]:
            if sum(seconds[name]) < budget:
                setup(name)
                seconds[name].append(measure(steps[name], device))
        if left := sum(seconds_left(times, rounds, budget) for times in seconds.values()):
            report(f"round {index + 1} of {rounds}; about {duration(left)} left")
    return seconds


def seconds_left(times: list[float], rounds: int, budget: float) -> float:
    """What `interleaved` has yet to spend on a step that has taken `times` so far."""
    once = sum(times) / len(times)
    return max(math.ceil(min(rounds, budget / max(once, 1e-9))) - len(times), 0) * once


def duration(seconds: float) -> str:
    """For people who wait."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def measure(function: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one call, waiting for the device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def median_of(function: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """The median of the calls that fit in a moment, after one to warm up."""
    return median(_times(function, device))


def _times(function: Callable[[], object], device: torch.device | str) -> list[float]:
    function()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.5 and len(times) < 200):
        times.append(measure(function, device))
    return times


def device_seconds(
    function: Callable[[], object], device: torch.device | str, *, budget: float = 0.3
) -> float:
    """The median time of a call by the device's own clock, with nothing of it in a cache.

    The caches are flushed before each call, for so long that the host has launched the call by the
    time the device comes to it: kernels are timed, not Python. On a CPU: `median_of`.

    Args:
        budget: Seconds that the calls may take together; there are at least five, at most 100.
    """
    if torch.device(device).type != "cuda":
        return median_of(function, device)
    cold = torch.empty(1 << 28, dtype=torch.int8, device=device)  # larger than any cache
    for call in (function, cold.zero_):
        call()
    once = measure(function, device)
    start = time.perf_counter()
    function()
    launched = time.perf_counter() - start
    flushes = 1 + math.ceil(1.5 * launched / measure(cold.zero_, device))
    events = []
    for _ in range(min(max(int(budget / once), 5), 100)):
        for _ in range(flushes):
            cold.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        events.append((start, end))
    synchronize(device)
    return median(start.elapsed_time(end) for start, end in events) / 1e3


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def ratio(times: list[float], base: list[float]) -> float:
    """The median over the rounds of one's time over the other's.

    Where one ran in fewer rounds, the ratio of the medians.
    """
    if len(times) != len(base):
        return median(times) / median(base)
    return median(x / y for x, y in zip(times, base, strict=True))


class PeakMemory:
    """Bytes in use at most within a ``with`` block, beyond those in use before it.

    On a GPU as PyTorch's allocator counts them; on Linux the process's resident memory. `bytes` is
    None where neither can be known.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif _STATUS.exists():
            ctypes.CDLL(None).malloc_trim(0)
            try:
                _CLEAR_REFS.write_text("5")  # the peak starts again from here
                self._before = _resident("VmRSS")
            except OSError:
                self._before = None
        return self

    def __exit__(self, *exception) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif _STATUS.exists() and self._before is not None:
            self.bytes = _resident("VmHWM") - self._before


_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def matmul_rate(device: torch.device | str, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a large square matrix product: the roof over everything that computes."""
    size = size or (1024 if torch.device(device).type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(_times(lambda: a @ b, device))


def copy_bandwidth(device: torch.device | str) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.ones(1 << 27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(_times(lambda: target.copy_(source), device))
