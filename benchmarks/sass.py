"""Static throughput model of a CUDA kernel's hot loops, from its machine code alone.

A hot loop is an innermost loop that holds matrix instructions. Each is costed in SM cycles per
CTA iteration for every unit of the SM, and then, as fractions of the chip's dense bf16 peak:

    bound   tensor / max(units)              perfect overlap: cannot be beaten
    serial  tensor / (tensor + worst other)  nothing overlaps the matrix instructions
    sim     in-order replay of the loop by all resident warps of one SM sub-partition, honouring
            the stall counts and scoreboards that ptxas encoded (sm_80 and sm_90 only)

Not modelled: latency and bandwidth of L2 and HBM (loads count as prefetched), bank conflicts,
throttling, prologue and epilogue, waves, imbalance of tiles. Rates marked (?) come from
microbenchmarks or inference, not from vendors' tables.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import triton


@dataclass(frozen=True)
class Chip:
    """Per SM and clock: dense bf16 FMAs, those of warp-level HMMA, lanes, and bytes."""

    mma: int
    hmma: int
    fp32: int
    shared_bytes: int
    alu: int = 64  # integer, compare, select, pack ((?) on sm_100)
    mufu: int = 16
    shared_bandwidth: int = 128  # of LDS, STS and of the operands that HGMMA and UTCHMMA read (?)


CHIPS = {
    80: Chip(1024, 1024, 64, 164 << 10),
    90: Chip(2048, 1290, 128, 228 << 10),  # warp-level HMMA reaches about 63 % of wgmma (?)
    100: Chip(4096, 1290, 128, 228 << 10),
}
REGISTERS, MAX_WARPS, TENSOR_MEMORY, MAX_CTAS = 65536, 64, 512, 32
SYSTEM_SHARED = 1024  # bytes of shared memory that the system keeps per CTA

MMA_ISSUERS = {"HMMA": "warp", "HGMMA": "warpgroup", "UTCHMMA": "cta"}
SPILLS = {"LDL", "STL"}
MUFU = {"MUFU", "F2F", "F2I", "I2F", "POPC", "FLO", "BREV"}
PACKED = {"FADD2", "FMUL2", "FFMA2"}
FMA = PACKED | {"FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2", "IMAD"}
MEMORY = {
    "LDS", "LDSM", "STS", "STSM", "LDG", "STG", "LDGSTS", "LDL", "STL", "LD", "ST", "RED", "REDG",
    "ATOM", "ATOMG", "ATOMS", "SHFL", "REDUX",
}  # fmt: skip
FREE = {
    "BAR", "WARPSYNC", "WARPGROUP", "DEPBAR", "LDGDEPBAR", "SYNCS", "BSSY", "BSYNC", "MEMBAR",
    "FENCE", "ERRBAR", "CCTL", "ELECT", "NANOSLEEP", "YIELD", "BRA", "NOP", "EXIT", "R2UR", "S2R",
    "CS2R", "CALL", "LDC", "LDTM", "STTM",
}  # fmt: skip
JUMPS = {"BRA", "JMP", "BRX", "EXIT", "RET"}
LATENCY = {  # cycles (?)
    "MUFU": 22, "LDS": 26, "LDSM": 32, "SHFL": 25, "LDG": 280, "LD": 280, "LDC": 30, "S2R": 30,
    "LDGSTS": 15, "LDL": 35, "STS": 10, "STL": 10, "BAR": 16, "MEMBAR": 16, "HGMMA": 20,
    "SYNCS": 20,
}  # fmt: skip
QUEUE = {"mufu": 8, "smem": 48}  # cycles of work that a unit can queue (?)

INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/"
    r"\s*/\* 0x([0-9a-f]{16}) \*/",
    re.S,
)


class Instruction:
    def __init__(self, address: str, predicate: str, op: str, args: str, high_word: str):
        self.address, self.predicate, self.op, self.args = int(address, 16), predicate, op, args
        self.root = op.split(".")[0]
        control = int(high_word, 16) >> 41
        self.stall = control & 15
        # Scoreboards that its result and its operands' release set (7: none), and those it awaits.
        self.writes, self.reads, self.waits = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63

    @property
    def runs(self) -> bool:
        return self.predicate != "@!PT"


@dataclass
class Loop:
    """One path through a hot loop; costs are SM cycles per CTA iteration."""

    instructions: int
    macs: float
    spills: int
    mma: list[str]
    cycles: dict[str, float]
    bound: float
    serial: float
    sim: float | None

    @property
    def limiter(self) -> str:
        return max(self.cycles, key=self.cycles.get)


@dataclass
class Kernel:
    registers: int
    shared_bytes: int
    warps: int
    ctas: int
    spills: int
    loops: list[Loop] = field(default_factory=list)


def analyze(compiled, sim: bool = True) -> Kernel:
    """The hot loops of what `triton.compile` or a kernel launch returned, in program order.

    A loop whose shortest path is much shorter than its longest counts as two.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        arch, code, usage, threads = _load(file.name)
    chip = CHIPS.get(arch, CHIPS[80])
    warps = threads // 32
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
    shared = compiled.metadata.shared
    resident = min(
        REGISTERS // (-(-usage["REG"] * 32 // 256) * 256 * warps),
        MAX_WARPS // warps,
        MAX_CTAS,
        chip.shared_bytes // (shared + SYSTEM_SHARED),
        TENSOR_MEMORY // tensor_memory if tensor_memory else MAX_CTAS,
    )
    spills = sum(x.root in SPILLS for x in code)
    kernel = Kernel(usage["REG"], shared, warps, resident, spills)

    spans, successors = _basic_blocks(code)
    loops, back_edges = _natural_loops(successors)
    hot = {
        header: body
        for header, body in loops.items()
        if any(x.root in MMA_ISSUERS for block in body for x in code[slice(*spans[block])])
    }
    for header, body in sorted(hot.items()):
        if any(other < body for other in hot.values()):
            continue
        longest, shortest = (
            _path(code, spans, successors, body, back_edges, header, sign) for sign in (1, -1)
        )
        paths = [longest] if len(shortest) > 0.97 * len(longest) else [longest, shortest]
        simulate = sim and arch in (80, 90) and resident > 0
        kernel.loops += [_cost(path, code, chip, warps, resident, simulate) for path in paths]
    return kernel


def _cuobjdump(flag: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout


def _load(path: str) -> tuple[int, list[Instruction], dict[str, int], int]:
    """(sm version, instructions, resource usage, threads per CTA) of a cubin's one kernel."""
    text = _cuobjdump("-sass", path)
    code = [Instruction(*match) for match in INSTRUCTION.findall(text.split("Function : ")[1])]
    usage = re.search(r"Function \S+:\s*(.*)", _cuobjdump("-res-usage", path))[1]
    usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
    threads = re.search(
        r"EIATTR_REQNTID\n.*?Value:\s*(0x\w+) (0x\w+)", _cuobjdump("-elf", path), re.S
    )
    arch = int(re.search(r"code for sm_(\d+)", text)[1])
    return arch, code, usage, int(threads[1], 16) * int(threads[2], 16)


def _basic_blocks(code: list[Instruction]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Basic blocks as ranges of instructions, and the successors of each."""
    at = {x.address: i for i, x in enumerate(code)}
    target = {}
    for i, x in enumerate(code):
        match = re.search(r"0x([0-9a-f]+)$", x.args)
        if x.root in ("BRA", "JMP") and ".DIV" not in x.op and match:
            target[i] = at[int(match[1], 16)]
    after_jumps = (i + 1 for i, x in enumerate(code[:-1]) if x.root in JUMPS)
    heads = sorted({0, *target.values(), *after_jumps})
    block_of = {head: block for block, head in enumerate(heads)}
    spans = list(zip(heads, [*heads[1:], len(code)], strict=True))
    successors = []
    for _, end in spans:
        last = code[end - 1]
        conditional = last.predicate or "," in last.args  # as in BRA.U UP0, target
        falls_through = end in block_of and (last.root not in JUMPS or conditional)
        jump = [block_of[target[end - 1]]] if end - 1 in target else []
        successors.append(jump + ([block_of[end]] if falls_through else []))
    return spans, successors


def _natural_loops(successors: list[list[int]]) -> tuple[dict[int, set[int]], set]:
    """{header: blocks} and the back edges, by dominators."""
    count, loops, predecessors = len(successors), defaultdict(set), defaultdict(list)
    for u in range(count):
        for v in successors[u]:
            predecessors[v].append(u)
    dominators = [{0}] + [set(range(count)) for _ in range(count - 1)]
    changed = True
    while changed:
        changed = False
        for v in range(1, count):
            above = [dominators[p] for p in predecessors[v]]
            new = {v} | (set.intersection(*above) if above else set())
            changed, dominators[v] = changed or new != dominators[v], new
    back_edges = {(u, h) for u in range(count) for h in successors[u] if h in dominators[u]}
    for u, header in back_edges:
        body, todo = {header}, [u]
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += predecessors[block]
        loops[header] |= body
    return loops, back_edges


def _path(code, spans, successors, body, back_edges, header, sign) -> list[Instruction]:
    """From header to latch with the most MMAs, then the most (+1) or fewest (-1) instructions."""
    memo = {}

    def best(block):
        if block not in memo:
            memo[block] = (float("-inf"), 0, ())
            inside = (s for s in successors[block] if s in body)
            tails = [best(s) for s in inside if not {(block, s), (s, s)} & back_edges]
            tails += [(0, 0, ())] * ((block, header) in back_edges)
            if tails:
                (mmas, length, path), own = max(tails), code[slice(*spans[block])]
                mmas += sum(x.root in MMA_ISSUERS for x in own)
                memo[block] = (mmas, length + sign * len(own), (block, *path))
        return memo[block]

    return [x for block in best(header)[2] for x in code[slice(*spans[block])]]


def _mma_cost(x: Instruction, code: list[Instruction], chip: Chip) -> tuple[int, float, float]:
    """MACs of one MMA instruction, and its SM cycles of tensor core and of shared memory."""
    if x.root == "HMMA":
        macs = {"16816": 2048, "1688": 1024}[x.op.split(".")[1]]
        return macs, macs / chip.hmma, 0.0
    if x.root == "HGMMA":
        m, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", x.op).groups())
        a_in_shared, passes = x.args.split(",")[1].strip().startswith("gdesc"), 1
    else:  # tcgen05: M and N are in the instruction descriptor, a UMOV constant
        register = re.search(r"idesc\[(UR\d+)\]", x.args)[1]
        constants = [
            (u.address < x.address, u.address, int(match[1], 16))
            for u in code
            if u.root == "UMOV" and (match := re.match(register + r", (0x\w+)$", u.args))
        ]
        descriptors = [
            c for c in constants if c[2] & 0x30 == 0x10 and c[2] >> 24 & 31 in (4, 8, 16)
        ]
        word = max(descriptors, default=(0, 0, 0))[2]
        m, n, k = (word >> 24 & 31) << 4, (word >> 17 & 63) << 3, 16
        a_in_shared = x.args.startswith("gdesc")
        passes = 2 if m == 64 else 1  # M = 64 uses half of the array (?)
    shared = (n + m * a_in_shared) * k * 2 / chip.shared_bandwidth
    return m * n * k, passes * m * n * k / chip.mma, shared


def _unit_cost(x: Instruction, chip: Chip) -> tuple[str, float]:
    """(unit, SM cycles of one warp's instruction there), for what is not an MMA."""
    root = x.root
    if not x.runs or root in MMA_ISSUERS or root in FREE or root[0] == "U":
        return "other", 0.0
    if root in MUFU:
        return "mufu", 32 / chip.mufu
    if root in FMA:
        return "fma", (64 if root in PACKED else 32) / (chip.alu if root == "IMAD" else chip.fp32)
    if root in MEMORY:
        if root in ("SHFL", "REDUX"):
            return "smem", 1.0
        matrices = {"4": 4, "2": 2}.get(x.op.split(".")[-1], 1) if root in ("LDSM", "STSM") else 1
        words = 4 if ".128" in x.op else 2 if ".64" in x.op else matrices
        return "smem", 128 * words / chip.shared_bandwidth
    return "alu", 32 / chip.alu


def _cost(path, code, chip: Chip, warps: int, ctas: int, simulate: bool) -> Loop:
    cycles: Counter[str] = Counter(issue=len(path) * warps / 4)
    macs, mma = 0, set()
    for x in path:
        unit, cost = _unit_cost(x, chip)
        cycles[unit] += cost * warps
        if x.root in MMA_ISSUERS:
            times = {"warp": warps, "warpgroup": warps // 4, "cta": 1}[MMA_ISSUERS[x.root]]
            own, tensor, shared = _mma_cost(x, code, chip)
            macs += own * times
            cycles["tensor"] += tensor * times
            cycles["smem"] += shared * times
            mma.add(x.root)
    cycles.pop("other", None)
    ideal = macs / chip.mma
    bound = ideal / max(cycles.values())
    rest = max(value for unit, value in cycles.items() if unit != "tensor")
    replayed = ideal / _replay(path, code, chip, warps, ctas) if simulate else None
    return Loop(
        instructions=len(path),
        macs=macs,
        spills=sum(x.root in SPILLS for x in path),
        mma=sorted(mma),
        cycles=dict(cycles),
        bound=bound,
        serial=ideal / (cycles["tensor"] + rest),
        sim=None if replayed is None else min(bound, replayed),
    )


def _replay(path, code, chip: Chip, warps: int, ctas: int, iterations: int = 12) -> float:
    """Steady-state SM cycles per CTA iteration: one sub-partition, 1/4 of the resident warps."""
    per_cta = max(1, warps // 4)  # that wait for each other; two CTAs of two warps take turns
    resident = max(1, warps * ctas // 4)
    trace = []
    for x in path:
        unit, cost = _unit_cost(x, chip)
        shared = 0.0
        if x.root in MMA_ISSUERS:
            unit = "tensor"
            _, cost, shared = _mma_cost(x, code, chip)
        # A sub-partition has a quarter of the SM's units; a warpgroup uses those of all four.
        cost = max(cost, shared) if x.root == "HGMMA" else 4 * cost
        trace.append((x, unit, cost, shared))
    states = [
        {"pc": 0, "t": 37.0 * (k // per_cta), "board": [0.0] * 8, "groups": [],
         "cta": k // per_cta, "parked": False}
        for k in range(resident)
    ]  # fmt: skip
    free, waiting = defaultdict(float), defaultdict(list)
    last, now, ends = None, 0.0, []
    while len(ends) < iterations * len(states):
        ready = []
        for i, w in enumerate(states):
            if w["parked"]:
                continue
            x, unit, cost, _ = trace[w["pc"]]
            earliest = max([w["t"]] + [w["board"][b] for b in range(6) if x.waits >> b & 1])
            if x.root == "WARPGROUP" and "DEPBAR" in x.op:  # all but the last n wgmma groups
                pending = len(w["groups"]) - int(x.args.split(",")[1], 16)
                earliest = max([earliest, *w["groups"][: max(pending, 0)]])
            if cost and x.root != "HGMMA":
                earliest = max(earliest, free[unit] - QUEUE.get(unit, 0))
            ready.append((max(earliest, now), w is not last, i, w))
        t, _, _, w = min(ready)
        x, unit, cost, shared = trace[w["pc"]]
        now, last, start = t + 1, w, t
        if cost:
            start = max(t, free[unit], free["smem"] - QUEUE["smem"] if shared else 0)
            free[unit] = start + cost
            if shared:
                free["smem"] = max(free["smem"], start) + shared
        done = start + cost + LATENCY.get(x.root, 6)
        if x.root == "HGMMA" and "gsb0" in x.args:
            w["groups"] = [*w["groups"], done][-8:]
        w["board"][x.writes] = max(w["board"][x.writes], done)
        w["board"][x.reads] = max(w["board"][x.reads], start + cost + 8)
        w["t"], w["pc"] = t + max(1, x.stall), (w["pc"] + 1) % len(trace)
        ends += [t] * (w["pc"] == 0)
        if x.op.startswith(("BAR.SYNC", "BAR.RED")):
            w["parked"] = True
            waiting[w["cta"]].append(w)
            if len(waiting[w["cta"]]) == per_cta:
                for other in waiting.pop(w["cta"]):
                    other["parked"], other["t"] = False, t + LATENCY["BAR"]
    warm = 3 * len(states)  # iterations that ended before the measurement starts
    return (ends[-1] - ends[warm]) / (len(ends) - 1 - warm) * warps / 4
